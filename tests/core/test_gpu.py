"""What only a CUDA GPU does: passes replayed as CUDA graphs, and quantisers as fused kernels."""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bitdistill_core import losses
from bitdistill_core.blockwise import train_blocks
from bitdistill_core.losses import Batch
from bitdistill_core.quantize.activation import fake_quantize_activation
from bitdistill_core.quantize.weight import WeightQuantizer, fake_quantize_weight
from bitdistill_core.replay import replayed_decoder
from bitdistill_core.stages.training import add_dropout
from tests.core.batches import make_batch
from tests.core.loss_parts import step
from tests.core.students import student_of

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


def test_blocks_are_trained_as_on_a_cpu(tmp_path: Path) -> None:
    steps = [[make_batch([18, 20, 12], seed=1)], [make_batch([7, 9], seed=2)]]
    options: dict[str, Any] = {"schedule": "linear", "warmup_ratio": 0.1, "weight_decay": 0.0, "adam_beta2": 0.95}
    options |= {"max_grad_norm": 1.0, "precision": "float32", "report_every": 5, "checkpoint_every": 1000}
    errors: dict[str, list[float]] = {"cpu": [], "cuda": []}
    for name, log in errors.items():
        device = torch.device(name)
        teacher = make_model().to(device)
        train_blocks(
            student_of(teacher),
            teacher,
            steps,
            name="blockwise",
            num_epochs=5,
            seed=0,
            work_dir=tmp_path / name,
            report=lambda metrics, _, log=log: log.extend(v for k, v in metrics.items() if k.endswith("block_error")),
            device=device,
            learning_rate=3e-4,  # of a higher one rounding makes other codes
            **options,
        )
    assert len(errors["cuda"]) == 3
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.05)


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
    tolerance = 1e-3 if precision == "float32" else 0.1
    with replayed_decoder(replayed, GPU):
        for seed, lengths in enumerate([[18, 20, 12], [7, 9], [20, 20, 1], [9, 3], [200] * 40]):
            batch = make_batch(lengths, seed=seed).to(GPU)
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


def test_every_part_of_the_loss_is_replayed_and_can_be_differentiated_apart() -> None:
    teacher = make_model()
    student, plain = student_of(teacher), student_of(teacher)
    replayed_teacher = copy.deepcopy(teacher)
    with replayed_decoder(student, GPU), replayed_decoder(replayed_teacher, GPU):
        for seed, lengths in enumerate([[18, 16, 12], [40, 3, 11], [9, 9, 16]]):
            batch = make_batch(lengths, seed=seed).padded(16).to(GPU)
            expected, wanted = step(plain, teacher, batch, torch.float32)
            found, gradients = step(student, replayed_teacher, batch, torch.float32)
            for part, value in expected.items():
                torch.testing.assert_close(found[part], value, rtol=1e-3, atol=1e-5, msg=part)
            for (gradient, total), (whole, _) in zip(gradients, wanted, strict=True):
                assert (gradient - whole).norm() <= 1e-3 * whole.norm() + 1e-6
                assert (total - whole).norm() <= 1e-3 * whole.norm() + 1e-6


def test_recordings_leave_what_is_random_to_the_step() -> None:
    batch = make_batch([16, 9]).to(GPU)
    drawn = []
    with ExitStack() as stack:
        for records in (True, False):
            model = student_of(make_model())
            add_dropout(model, 0.5)
            stack.enter_context(replayed_decoder(model.train(), GPU))
            if not records:
                losses.hidden_states(model, batch)
            torch.manual_seed(7)
            drawn.append(losses.hidden_states(model, batch).detach().clone())
    torch.testing.assert_close(*drawn)


def test_fused_quantisers_round_as_on_a_cpu() -> None:
    """But for a few values at a threshold, since a division on a GPU may be off by an ulp or two."""

    def share_that_differs(mine: torch.Tensor, wanted: torch.Tensor) -> float:
        return float(((mine.cpu() - wanted).abs() > 1e-5 * wanted.abs().max()).float().mean())

    torch.manual_seed(0)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            for shape in [(4, 7, 96), (3, 5, 96), (2, 9, 160)]:
                x = torch.randn(shape, device=GPU)
                assert share_that_differs(fake_quantize_activation(x), fake_quantize_activation(x.cpu())) < 0.002
            for quantizer in (WeightQuantizer(), WeightQuantizer(granularity="row")):
                for shape in [(64, 96), (160, 64), (576, 576)]:
                    weight = torch.randn(shape, device=GPU)
                    wanted = fake_quantize_weight(weight.cpu(), quantizer)
                    assert share_that_differs(fake_quantize_weight(weight, quantizer), wanted) < 0.002
