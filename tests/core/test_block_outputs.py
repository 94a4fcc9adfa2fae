"""Block outputs and their distance, against a plain loop over blocks, sequences and tokens."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitdistill_core import losses
from bitdistill_core.block_outputs import captured_blocks, hidden_kd_loss, require_same_blocks
from bitdistill_core.losses import Batch
from bitdistill_core.surgery import operate
from tests.core.batches import make_batch, split
from tests.core.conftest import build
from tests.core.hooks import block_outputs, num_hooks


def random_blocks(batch: Batch, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*batch.input_ids.shape, 6, generator=generator) for _ in range(3)]


def test_every_forward_pass_replaces_what_was_captured(any_model: PreTrainedModel) -> None:
    first, second = make_batch([5, 8], [1, 1]), make_batch([3], [1])
    with torch.no_grad(), captured_blocks(any_model) as captured:
        for batch in (first, second):
            losses.hidden_states(any_model, batch)
            expected = block_outputs(any_model, batch.input_ids)
            losses.hidden_states(any_model, batch)
            assert len(captured) == 2
            assert all(torch.equal(one, other) for one, other in zip(captured, expected, strict=True))


def test_the_last_block_before_the_final_norm_is_captured() -> None:
    model, batch = build("qwen3"), make_batch([5, 8], [1, 1])
    with torch.no_grad(), captured_blocks(model) as captured:
        hidden = losses.hidden_states(model, batch)
        assert torch.allclose(model.get_decoder().norm(captured[-1]), hidden)


def test_hooks_are_gone_afterwards_even_after_an_error() -> None:
    model = build("qwen3")
    with captured_blocks(model) as captured:
        model(torch.arange(4)[None])
    before = num_hooks(model)
    with pytest.raises(IndexError), captured_blocks(model):
        model(torch.tensor([[1000]]))  # no such token
    assert num_hooks(model) == before == 0
    model(torch.arange(7)[None])
    assert captured[0].shape[1] == 4


def test_the_distance_is_relative_to_each_token_and_ignores_padding() -> None:
    batch = make_batch([4, 7], [1, 1])
    student, teacher = random_blocks(batch, 1), random_blocks(batch, 2)
    teacher[1][0, 2] *= 500  # a token with huge outputs counts like any other
    expected = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        for row, length in enumerate([4, 7]):
            for token in range(length):
                difference = ours[row, token] - theirs[row, token]
                expected += float(difference @ difference) / float(theirs[row, token] @ theirs[row, token])
    assert float(hidden_kd_loss(student, teacher, batch)) == pytest.approx(expected / (3 * 11), rel=1e-5)
    student[0][0, 4:], teacher[2][0, 4:] = 1e6, 0.0
    assert float(hidden_kd_loss(student, teacher, batch)) == pytest.approx(expected / (3 * 11), rel=1e-5)


def test_equal_outputs_have_no_distance_and_silent_ones_stay_finite() -> None:
    batch = make_batch([4, 7], [1, 1])
    student = random_blocks(batch, 1)
    assert float(hidden_kd_loss(student, [s.clone() for s in student], batch)) == 0.0
    silent = [torch.zeros_like(s) for s in student]
    assert torch.isfinite(hidden_kd_loss(student, silent, batch))
    assert float(hidden_kd_loss(silent, silent, batch)) == 0.0
    twice = hidden_kd_loss([2 * s for s in student], student, batch)
    assert float(twice) == pytest.approx(1.0, rel=1e-5)  # |2h - h|^2 / |h|^2


def test_the_gradient_reaches_the_student_only() -> None:
    student, teacher, batch = build("qwen3", seed=1), build("qwen3", seed=2), make_batch([5, 8], [1, 1])
    operate(student, subln="output", sub_norm_eps=1e-6)
    with captured_blocks(student) as ours, captured_blocks(teacher) as theirs:
        losses.hidden_states(student, batch)
        losses.hidden_states(teacher, batch)  # with gradient, which the loss must not use
        hidden_kd_loss(ours, theirs, batch).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    blocks = dict(student.get_decoder().layers.named_parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in blocks.values())
    assert student.get_decoder().norm.weight.grad is None  # behind the last block


def test_micro_batches_add_up_to_the_distance_of_the_step() -> None:
    student, teacher, batch = build("qwen3", seed=1), build("qwen3", seed=2), make_batch([5, 9, 7], [1, 2, 1])
    values = []
    with torch.no_grad(), captured_blocks(student) as ours, captured_blocks(teacher) as theirs:
        for parts in ([batch], split(batch)):
            value = 0.0
            for part in parts:
                losses.hidden_states(student, part)
                losses.hidden_states(teacher, part)
                value += float(hidden_kd_loss(ours, theirs, part))
            values.append(value)
    assert values[0] == pytest.approx(values[1], rel=1e-4)


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 1}, {"hidden_size": 16}])
def test_models_of_other_depth_or_width_are_refused(changes: dict[str, int]) -> None:
    depth, width = changes.get("num_hidden_layers", 2), changes.get("hidden_size", 32)
    message = rf"hidden_kd_weight compares .* same depth and width; got student=\(2, 32\), teacher=\({depth}, {width}\)"
    student = build("qwen3").config
    with pytest.raises(ValueError, match=message):
        require_same_blocks(student, build("qwen3", **changes, layer_types=None).config, "hidden_kd_weight")
    require_same_blocks(student, build("llama").config, "hidden_kd_weight")
