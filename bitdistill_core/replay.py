"""CUDA graphs: a forward and a backward pass as one launch each instead of thousands of small ones.

A small model computes in a fraction of the time that a processor takes to start its operations one by one. What is
recorded is the same computation, once for each shape of input; parameters are read where they lie, so they may be
trained. Nothing here for a CPU.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from bitdistill_core.passage import block_keywords

MAX_WORK = (
    1e12  # parameters times tokens of a pass; above it a GPU computes for longer than its operations take to start
)
LENGTH_MULTIPLE = 16  # sequences are padded to multiples of it, so that few shapes are recorded
WARM_UPS = 2  # calls before a recording: what a first call compiles or allocates must not be part of it
_OBSERVED = "_bitdistill_observed"  # attribute of a decoder: what its forward passes fill beside their output

Call = Callable[[Mapping[str, Tensor], tuple[Tensor, ...]], tuple[Tensor, ...]]  # parameters by name, inputs


@dataclass(frozen=True)
class _Recording:
    inputs: tuple[Tensor, ...]
    forward: torch.cuda.CUDAGraph
    outputs: tuple[Tensor, ...]
    backward: torch.cuda.CUDAGraph | None  # None: nothing is differentiated
    output_grads: tuple[Tensor, ...]
    gradients: tuple[Tensor | None, ...]  # of the differentiated inputs, then of the parameters


class Replay:
    """`call` of tensors on a GPU, recorded once for each shape and then replayed; differentiable as `call` is.

    A forward pass is differentiated before the next one, whose outputs overwrite its own. Autocast and whatever else
    `call` depends on must stay as in the first call, or be told apart by `key`.
    """

    def __init__(self, call: Call, module: nn.Module) -> None:
        """`module`: has the parameters that `call` is given, in memory that does not move."""
        self.call, self.module = call, module
        self._recordings: dict[Any, _Recording] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._gradients: list[Tensor] = []  # of the trained parameters, shared by all recordings

    def __call__(self, *inputs: Tensor, key: Any = None) -> tuple[Tensor, ...]:
        trained = []
        if torch.is_grad_enabled():
            trained = [x for x in (*inputs, *self.module.parameters()) if x.requires_grad]
        identity = (tuple((x.shape, x.requires_grad) for x in inputs), bool(trained), key)
        recording = self._recordings.get(identity)
        if recording is None:
            with _random_state_kept():
                recording = self._record(inputs, is_trained=bool(trained))
            self._recordings[identity] = recording
        for static, value in zip(recording.inputs, inputs, strict=True):
            static.copy_(value.detach())
        recording.forward.replay()
        if not trained:
            return recording.outputs
        outputs: tuple[Tensor, ...] = _Replayed.apply(recording, *trained)
        return outputs

    def _record(self, inputs: tuple[Tensor, ...], *, is_trained: bool) -> _Recording:
        # aliases of the parameters: the graph that an earlier step left behind ties these to another stream
        named = dict(self.module.named_parameters())
        aliases = {name: nn.Parameter(p.detach(), requires_grad=p.requires_grad) for name, p in named.items()}
        statics = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)
        sources = [x for x in statics if x.requires_grad]
        trained = [x for x in aliases.values() if x.requires_grad]
        if is_trained and not self._gradients:
            self._gradients = [torch.zeros_like(x) for x in trained]
        backward: torch.cuda.CUDAGraph | None = None
        grads: tuple[Tensor, ...] = ()
        gradients: tuple[Tensor | None, ...] = ()
        stream = _side_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                outputs = self.call(aliases, statics)
                if is_trained:
                    grads = tuple(torch.zeros_like(output) for output in outputs)
                    _gradients(outputs, [*sources, *trained], grads)
                del outputs
            forward = torch.cuda.CUDAGraph()
            with _captured(forward, self._pool):
                outputs = self.call(aliases, statics)
            if is_trained:
                backward = torch.cuda.CUDAGraph()
                with _captured(backward, self._pool):
                    found = _gradients(outputs, [*sources, *trained], grads)
                    pairs = list(zip(self._gradients, found[len(sources) :], strict=True))
                    torch._foreach_copy_(
                        [kept for kept, new in pairs if new is not None], [new for _, new in pairs if new is not None]
                    )
                    gradients = (*found[: len(sources)], *(None if new is None else kept for kept, new in pairs))
                    del found, pairs
        torch.cuda.current_stream().wait_stream(stream)
        detached = tuple(output.detach() for output in outputs)
        return _Recording(tuple(x.detach() for x in statics), forward, detached, backward, grads, gradients)


@lru_cache
def _side_stream() -> torch.cuda.Stream:
    """One for every recording: memory that was used on a stream stays with it."""
    return torch.cuda.Stream()


@contextmanager
def _captured(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    """Captures what the current stream is given, without the garbage collection of `torch.cuda.graph`."""
    torch.clear_autocast_cache()  # a cast from before would never be made again
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # what warm-ups took is of no use to the graph's pool, and is not freed meanwhile
    was_enabled = gc.isenabled()
    gc.disable()  # which could free memory of the GPU meanwhile
    try:
        graph.capture_begin(pool=pool)
        try:
            yield
        finally:
            graph.capture_end()
    finally:
        torch.clear_autocast_cache()
        if was_enabled:
            gc.enable()


def _random_state_kept() -> AbstractContextManager[None]:
    """What is random in a training step is a function of the step, whether it records or not."""
    return torch.random.fork_rng(range(torch.cuda.device_count()))


def _gradients(
    outputs: Sequence[Tensor], trained: Sequence[Tensor], output_grads: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    with torch.autocast("cuda", enabled=False):
        # retained: a backward pass that frees what it has used would overwrite it, and could be replayed only once
        return torch.autograd.grad(outputs, trained, output_grads, retain_graph=True, allow_unused=True)


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: _Recording, *trained: Tensor) -> tuple[Tensor, ...]:
        ctx.recording = recording
        ctx.set_materialize_grads(False)
        return tuple(output.view_as(output) for output in recording.outputs)

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor | None) -> tuple[Any, ...]:
        recording = ctx.recording
        for static, value in zip(recording.output_grads, output_grads, strict=True):
            if value is None:
                static.zero_()
            else:
                static.copy_(value)
        recording.backward.replay()
        found = [gradient for gradient in recording.gradients if gradient is not None]
        copies = iter(torch._foreach_mul(found, 1.0))  # the next pass overwrites them
        return None, *(None if gradient is None else next(copies) for gradient in recording.gradients)


class _Stack(nn.Module):
    """The blocks and the final norm of a decoder."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.layers: nn.ModuleList = decoder.layers
        self.norm: nn.Module = decoder.norm

    def forward(self, hidden: Tensor, keywords: Sequence[Mapping[str, Any]]) -> Tensor:
        for block, own in zip(self.layers, keywords, strict=True):
            output = block(hidden, **own)
            hidden = output[0] if isinstance(output, tuple) else output
        normed: Tensor = self.norm(hidden)
        return normed


def length_multiple(device: torch.device) -> int:
    """What lengths of sequences are padded to multiples of."""
    return LENGTH_MULTIPLE if device.type == "cuda" else 1


@contextmanager
def replayed_decoder(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Within, the decoder of a model that is trained or teaches on a CUDA device replays its blocks; elsewhere nothing.

    Its `last_hidden_state`, and what `observed` containers are filled with, are those of the model's own forward pass.
    Passes of more than MAX_WORK run as they are.
    """
    if device.type != "cuda":
        yield
        return
    decoder = model.get_decoder()
    embedding = model.get_input_embeddings()
    stack = _Stack(decoder)
    size = sum(p.numel() for p in stack.parameters())
    keywords: dict[int, list[dict[str, Any]]] = {}
    structures: dict[Any, Any] = {}

    def call(parameters: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = functional_call(stack, dict(parameters), (inputs[0], keywords[inputs[0].shape[1]]))
        containers = vars(decoder).get(_OBSERVED, ())
        seen, structures[_identities(containers)] = pytree.tree_flatten(list(containers))
        for container in containers:  # or it would keep the whole pass alive
            container.clear()
        return (hidden, *seen)

    replay = Replay(call, stack)

    def forward(input_ids: Tensor, use_cache: bool = False) -> Any:
        if size * input_ids.numel() > MAX_WORK:
            return type(decoder).forward(decoder, input_ids=input_ids, use_cache=use_cache)
        if input_ids.shape[1] not in keywords:
            with torch.no_grad(), _random_state_kept():
                keywords[input_ids.shape[1]] = block_keywords(decoder, list(stack.layers), input_ids[:1])
        containers = vars(decoder).get(_OBSERVED, ())
        hidden, *seen = replay(embedding(input_ids), key=_identities(containers))
        structure = structures[_identities(containers)]
        for container, filled in zip(containers, pytree.tree_unflatten(seen, structure), strict=True):
            container.clear()
            container.extend(filled) if isinstance(container, list) else container.update(filled)
        return SimpleNamespace(last_hidden_state=hidden)

    decoder.forward = forward
    try:
        yield
    finally:
        del decoder.forward


def _identities(containers: Sequence[Any]) -> tuple[int, ...]:
    return tuple(id(container) for container in containers)


@contextmanager
def observed(model: PreTrainedModel, container: list[Tensor] | dict[int, Any]) -> Iterator[None]:
    """Says that every forward pass of the decoder fills `container`, so that a replayed one does too."""
    decoder = model.get_decoder()
    before = vars(decoder).get(_OBSERVED, ())
    vars(decoder)[_OBSERVED] = (*before, container)
    try:
        yield
    finally:
        vars(decoder)[_OBSERVED] = tuple(other for other in vars(decoder)[_OBSERVED] if other is not container)
