import pytest
import torch
from torch import Tensor

from bitdistill_core.quantize import rows as rows_module
from bitdistill_core.quantize.rows import quantize_rows, round_rows


def embedding(size: int = 400, columns: int = 24) -> Tensor:
    """Rows with a common mean, and two columns that reach farther than the others, as those of trained models."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(size, columns, generator=generator) + 3 * torch.randn(columns, generator=generator)
    weight[:, 5] *= 16
    weight[:, 9] *= 0.1
    return weight


def error(weight: Tensor, rounded: Tensor) -> float:
    return float((rounded - weight).norm() / (weight - weight.mean(dim=0)).norm())


def test_rows_lie_around_their_mean_in_steps_of_their_row_and_column() -> None:
    weight = embedding()
    rows = quantize_rows(weight)
    deviation = weight.std(dim=0)
    overall = float((weight - weight.mean(dim=0)).square().mean().sqrt())
    assert float((rows.mean - weight.mean(dim=0)).abs().max()) <= overall / 8
    assert torch.equal(rows.column_scale.log2(), rows.column_scale.log2().round())
    expected = (deviation / overall) ** 0.75
    assert bool((rows.column_scale / expected <= 2**0.6).all())
    assert bool((rows.column_scale / expected >= 2**-0.6).all())
    scaled = (weight - rows.mean) / rows.column_scale
    assert torch.equal(rows.row_scale, scaled.abs().amax(dim=1) / 127)
    assert torch.equal(rows.w_int8, (scaled / rows.row_scale[:, None]).round().to(torch.int8))
    step = rows.row_scale[:, None] * rows.column_scale
    assert bool(((rows.dequantize() - weight).abs() <= step * 0.5001).all())


def test_a_common_mean_and_far_columns_no_longer_cost_precision() -> None:
    weight = embedding()
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    of_whole_rows = (weight / scale).round() * scale
    columns = torch.arange(24) != 5  # what the far column left of the others
    assert error(weight[:, columns], round_rows(weight)[:, columns]) < 0.5 * error(
        weight[:, columns], of_whole_rows[:, columns]
    )


@pytest.mark.parametrize("size", [1, 2, 3, 50, 400])
def test_rounding_rows_twice_changes_nothing(size: int) -> None:
    for seed in range(20):
        weight = torch.randn(size, 48, generator=torch.Generator().manual_seed(seed)) + 0.3
        weight[size // 2] = 0
        rounded = round_rows(weight)
        rows = quantize_rows(rounded)
        torch.testing.assert_close(rows.dequantize(), rounded, rtol=1e-6, atol=1e-6)
        assert torch.equal(quantize_rows(rows.dequantize()).w_int8, rows.w_int8)


def test_blocks_of_rows_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = embedding().bfloat16()
    whole = quantize_rows(weight)
    monkeypatch.setattr(rows_module, "ROWS_AT_ONCE", 37)
    parts = quantize_rows(weight)
    for name in ("w_int8", "row_scale", "column_scale", "mean"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))


def test_rows_that_are_all_the_same_have_no_mean() -> None:
    for weight in (torch.zeros(3, 8), torch.full((3, 8), 0.5)):
        rows = quantize_rows(weight)
        torch.testing.assert_close(rows.dequantize(), weight)
        assert not bool(rows.mean.any())
