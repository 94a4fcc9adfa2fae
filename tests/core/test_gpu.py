"""What only a CUDA GPU does: passes replayed as CUDA graphs, and quantisers as fused kernels."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bitdistill_core import losses
from bitdistill_core.block_outputs import hidden_kd_loss
from bitdistill_core.blockwise import train_blocks
from bitdistill_core.losses import Batch, Totals
from bitdistill_core.quantize.activation import fake_quantize_activation
from bitdistill_core.quantize.weight import WeightQuantizer, fake_quantize_weight
from bitdistill_core.replay import replay_decoder
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


def last_error(student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch) -> float:
    batch = batch.to(GPU)
    with torch.no_grad():
        ours, theirs = (losses.hidden_states(model, batch) for model in (student, teacher))
    return float(hidden_kd_loss([ours], [theirs], batch))


def test_blocks_come_nearer_to_their_teacher(tmp_path: Path) -> None:
    teacher = make_model()
    student = student_of(teacher)
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


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [make_model, lambda: student_of(make_model())])
def test_a_replayed_decoder_is_the_decoder(make: Callable[[], PreTrainedModel], precision: str) -> None:
    plain = make().requires_grad_(True)
    replayed = copy.deepcopy(plain)
    replay_decoder(replayed, GPU)
    tolerance = 1e-3 if precision == "float32" else 0.1
    for seed, lengths in enumerate([[18, 20, 12], [7, 9], [20, 20, 1], [9, 3], [200] * 40]):
        batch = make_batch(lengths, seed).to(GPU)
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
            loss, gradients = loss_and_gradients(plain, batch)
            found, mine = loss_and_gradients(replayed, batch)
        torch.testing.assert_close(found, loss, rtol=tolerance, atol=tolerance)
        assert mine.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (mine[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-6, name
        with torch.no_grad():
            for model in (plain, replayed):
                for parameter in model.parameters():
                    parameter.mul_(1.02)


def test_fused_quantisers_round_as_on_a_cpu() -> None:
    torch.manual_seed(0)
    for shape in [(4, 7, 96), (3, 5, 96), (2, 9, 160)]:
        x = torch.randn(shape, device=GPU)
        torch.testing.assert_close(fake_quantize_activation(x).cpu(), fake_quantize_activation(x.cpu()))
    for quantizer in (WeightQuantizer(), WeightQuantizer(granularity="row")):
        for shape in [(64, 96), (160, 64), (576, 576)]:
            weight = torch.randn(shape, device=GPU)
            mine, wanted = fake_quantize_weight(weight, quantizer).cpu(), fake_quantize_weight(weight.cpu(), quantizer)
            torch.testing.assert_close(mine, wanted)
