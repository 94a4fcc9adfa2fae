"""A loss and its gradients as CUDA graphs: one launch of the GPU instead of some hundred small ones.

A block of a small model computes in a fraction of the time that its operations take to start. What is recorded is the
same computation, one graph for each shape of batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

WARM_UPS = 2  # calls before a recording: what is compiled or allocated at a first call must not be recorded


class Replayable(Protocol):
    """A batch whose tensors can be overwritten."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Batches of one shape share a recording."""

    def static(self) -> "Replayable":
        """A copy in memory of its own."""

    def copy_(self, other: Any) -> None:
        """Overwrites every tensor with those of another batch of the same shape."""


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    batch: Replayable
    loss: Tensor
    gradients: tuple[Tensor, ...]


class ReplayedLoss:
    """`loss_fn` of a batch on a GPU; `backward()` gives the parameters the gradients that the graph computed.

    The parameters stay where they are in memory, and every one of them has a part in the loss. Autocast of the first
    call with a shape is that of all.
    """

    def __init__(self, loss_fn: Callable[[Any], Tensor], parameters: Sequence[Tensor]) -> None:
        self.loss_fn, self.parameters = loss_fn, tuple(parameters)
        self._recordings: dict[tuple[int, ...], _Recording] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, batch: Replayable) -> Tensor:
        recording = self._recordings.get(batch.shape)
        if recording is None:
            recording = self._recordings[batch.shape] = self._record(batch.static())
        recording.batch.copy_(batch)
        recording.graph.replay()
        loss: Tensor = _Replayed.apply(recording, *self.parameters)
        return loss

    def _record(self, batch: Replayable) -> _Recording:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                torch.autograd.grad(self.loss_fn(batch), self.parameters)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            loss = self.loss_fn(batch)
            gradients = torch.autograd.grad(loss, self.parameters)
        return _Recording(graph, batch, loss.detach(), gradients)


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: _Recording, *parameters: Tensor) -> Tensor:
        ctx.gradients = recording.gradients
        return recording.loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, *torch._foreach_mul(ctx.gradients, grads[0])
