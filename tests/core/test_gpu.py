"""What only a CUDA GPU does: compiled decoder blocks, and a block's loss replayed as a CUDA graph."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bitdistill_core import losses
from bitdistill_core.block_outputs import hidden_kd_loss
from bitdistill_core.blockwise import BlockBatch, train_blocks
from bitdistill_core.compiled import compile_blocks
from bitdistill_core.losses import Batch, Totals
from bitdistill_core.passage import Passage
from bitdistill_core.replay import ReplayedLoss
from bitdistill_core.surgery import operate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]
GPU = torch.device("cuda")


def make_model() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(GPU).requires_grad_(False)


def student_of(model: PreTrainedModel) -> PreTrainedModel:
    student = copy.deepcopy(model).requires_grad_(True)
    operate(student, subln="output", sub_norm_eps=1e-6)
    return student.to(GPU)


def make_batch(lengths: list[int], seed: int) -> Batch:
    ids = torch.randint(0, 300, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    labels = torch.full_like(ids, -100)
    labels[range(len(lengths)), torch.tensor(lengths) - 1] = 7
    return Batch(ids, labels, torch.tensor(lengths), Totals(len(lengths), sum(lengths), len(lengths)))


def test_a_replayed_loss_is_the_loss_and_gives_its_gradients() -> None:
    teacher = make_model()
    student = student_of(teacher)
    batches = [make_batch([9, 16, 3], 1), make_batch([5, 30, 31], 2), make_batch([16, 2, 11], 3)]
    flat = [batch.padded(16).to(GPU) for batch in batches]
    passage, theirs = (Passage.begin(model, [batch.input_ids for batch in flat]) for model in (student, teacher))
    theirs.advance()
    parameters = list(passage.block.parameters())

    def distance(micro: BlockBatch) -> torch.Tensor:
        return hidden_kd_loss([passage.run(micro.states)], [micro.target], micro.batch)

    replayed = ReplayedLoss(distance, parameters)
    for _ in range(2):
        for batch, states, target in zip(flat, passage.hidden, theirs.hidden, strict=True):
            micro = BlockBatch(batch, states.float(), target.float())
            expected = distance(micro)
            gradients = torch.autograd.grad(expected, parameters)
            for parameter in parameters:
                parameter.grad = None
            loss = replayed(micro) / batch.totals.num_tokens
            loss.backward()
            torch.testing.assert_close(loss, expected)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)
        with torch.no_grad():  # what is recorded reads the parameters where they are
            for parameter in parameters:
                parameter.mul_(1.1)


def last_error(student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch) -> float:
    batch = batch.to(GPU)
    with torch.no_grad():
        ours, theirs = (losses.hidden_states(model, batch) for model in (student, teacher))
    return float(hidden_kd_loss([ours], [theirs], batch))


@pytest.mark.parametrize("compiled", [False, True])
def test_blocks_come_nearer_to_their_teacher(compiled: bool, tmp_path: Path) -> None:
    teacher = make_model()
    student = student_of(teacher)
    if compiled:
        compile_blocks(student, GPU)
        compile_blocks(teacher, GPU)
    steps = [[make_batch([18, 20, 12], 1)], [make_batch([7, 9], 2)]]
    before = last_error(student, teacher, steps[0][0])
    log: list[dict[str, float]] = []
    options: dict[str, Any] = {"schedule": "linear", "warmup_ratio": 0.1, "weight_decay": 0.0, "adam_beta2": 0.95}
    options |= {"max_grad_norm": 1.0, "precision": "bfloat16", "report_every": 5, "checkpoint_every": 1000}
    metrics = train_blocks(
        student,
        teacher,
        steps,
        name="blockwise",
        num_epochs=40,
        seed=0,
        work_dir=tmp_path,
        report=lambda metrics, _: log.append(metrics),
        device=GPU,
        learning_rate=3e-3,
        **options,
    )
    assert last_error(student, teacher, steps[0][0]) < 0.7 * before
    assert 0 < metrics["blockwise/block_error"] < 0.5


def loss_and_gradients(model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = losses.task_loss(model, losses.hidden_states(model, batch), batch)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("make", [make_model, lambda: student_of(make_model())])
def test_compiled_blocks_compute_the_same(make: Callable[[], PreTrainedModel]) -> None:
    model = make().requires_grad_(True)
    batches = [make_batch([18, 20, 12], 1).to(GPU), make_batch([7, 9], 2).to(GPU)]
    expected = [loss_and_gradients(model, batch) for batch in batches]
    compile_blocks(model, GPU)
    for batch, (loss, gradients) in zip(batches, expected, strict=True):
        found, compiled = loss_and_gradients(model, batch)
        torch.testing.assert_close(found, loss, rtol=1e-3, atol=1e-3)
        assert compiled.keys() == gradients.keys()
        for name, gradient in gradients.items():  # an INT8 code may round the other way
            assert (compiled[name] - gradient).norm() < 0.05 * gradient.norm() + 1e-6, name
