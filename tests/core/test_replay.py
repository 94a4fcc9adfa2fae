"""Replayed passes give what the passes themselves give, on a stand-in for CUDA graphs that runs on a CPU.

The stand-in records every operation of a capture and replays it on the memory it was recorded with, as a graph does.
tests/core/test_gpu.py has the real ones.
"""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from bitdistill_core import losses, replay
from bitdistill_core.blockwise import BlockBatch, _loss_fn
from bitdistill_core.passage import Passage
from bitdistill_core.replay import replayed_decoder
from tests.core.batches import make_batch
from tests.core.loss_parts import step
from tests.core.students import student_of

GPU = torch.device("cuda")


class _Recorder(TorchDispatchMode):
    def __init__(self, operations: list[Any]) -> None:
        super().__init__()
        self.operations = operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out


class Graph:
    """The interface of torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.operations: list[Any] = []

    def capture_begin(self, pool: Any) -> None:
        self.recorder = _Recorder(self.operations)
        self.recorder.__enter__()

    def capture_end(self) -> None:
        self.recorder.__exit__(None, None, None)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, recorded in self.operations:
            out = func(*args, **kwargs)
            memory = {x.untyped_storage().data_ptr() for x in pytree.tree_leaves((args, kwargs)) if _is_tensor(x)}
            for old, new in zip(pytree.tree_leaves(recorded), pytree.tree_leaves(out), strict=True):
                if _is_tensor(old) and old.untyped_storage().data_ptr() not in memory:
                    old.copy_(new)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    class Stream:
        def wait_stream(self, other: Any) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    replay._side_stream.cache_clear()
    yield
    replay._side_stream.cache_clear()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_replayed_decoder_is_the_decoder(any_model: PreTrainedModel, precision: torch.dtype) -> None:
    teacher, student = any_model.requires_grad_(False), student_of(any_model)
    plain = copy.deepcopy(student)
    replayed_teacher = copy.deepcopy(teacher)
    # longer than Gemma's sliding window of 16; of one shape three, so that two are replayed
    lengths = [[18, 20, 12], [20, 3, 11], [5, 9], [1, 20, 20]]
    with replayed_decoder(student, GPU), replayed_decoder(replayed_teacher, GPU):
        for number, own in enumerate(lengths):
            batch = make_batch(own, seed=number)
            expected, expected_gradients = step(plain, teacher, batch, precision)
            found, gradients = step(student, replayed_teacher, batch, precision)
            for part, value in expected.items():
                torch.testing.assert_close(found[part], value, msg=part)
            assert len(gradients) == len(expected_gradients)
            for (gradient, total), (wanted, _) in zip(gradients, expected_gradients, strict=True):
                torch.testing.assert_close(gradient, wanted)
                if precision is torch.float32:
                    torch.testing.assert_close(total, wanted, rtol=1e-3, atol=1e-5)
            with torch.no_grad():  # a step of training
                for model in (plain, student):
                    for index, parameter in enumerate(model.parameters()):
                        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
                        parameter.add_(0.01 * noise)


def test_a_replayed_block_is_the_block(any_model: PreTrainedModel) -> None:
    teacher, student = any_model.requires_grad_(False), student_of(any_model)
    batches = [make_batch(lengths, [1, 1], seed=n) for n, lengths in enumerate([[18, 20], [20, 7], [3, 9], [20, 20]])]
    passage, theirs = (Passage.begin(model, [batch.input_ids for batch in batches]) for model in (student, teacher))
    theirs.advance()
    loss_fns = [_loss_fn(passage, device) for device in (torch.device("cpu"), GPU)]
    block = passage.block
    for batch, states, target in zip(batches, passage.hidden, theirs.hidden, strict=True):
        parts = []
        for loss_fn in loss_fns:
            block.zero_grad()
            loss = loss_fn(BlockBatch(batch, states, target))["hidden_kd"]
            loss.backward()
            parts.append((loss.detach(), [p.grad.clone() for p in block.parameters() if p.grad is not None]))
        (loss, gradients), (replayed, found) = parts
        torch.testing.assert_close(replayed, loss)
        assert len(found) == len(gradients) == len(list(block.parameters()))
        for mine, wanted in zip(found, gradients, strict=True):
            torch.testing.assert_close(mine, wanted)
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.mul_(1.01)


def test_a_decoder_is_itself_again_behind_the_context(any_model: PreTrainedModel) -> None:
    with replayed_decoder(any_model, GPU):
        assert "forward" in vars(any_model.get_decoder())
    assert "forward" not in vars(any_model.get_decoder())
    with replayed_decoder(any_model, torch.device("cpu")):
        assert "forward" not in vars(any_model.get_decoder())


def test_large_passes_run_as_they_are(any_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch([18, 20, 12], [1, 1, 1], seed=1)
    expected = losses.hidden_states(any_model, batch)
    monkeypatch.setattr(replay, "MAX_WORK", 1)
    monkeypatch.setattr(replay.Replay, "__call__", None)
    with replayed_decoder(any_model, GPU):
        torch.testing.assert_close(losses.hidden_states(any_model, batch), expected)
