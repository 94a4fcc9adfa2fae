"""Weight quantisers against BitDistill Eq. 1-2 and BitNet (2310.11453) Eq. 1-3, a scale a tensor, row or block."""

import pytest
import torch

from bitdistill_core.quantize.weight import (
    WeightQuantizer,
    fake_quantize_weight,
    quantize_weight,
    require_divisible,
    spread,
)

TERNARY = WeightQuantizer()
QUANTIZERS = [
    WeightQuantizer(grid=grid, granularity=granularity, block_size=8 if granularity == "block" else 0)
    for grid in ("ternary", "binary")
    for granularity in ("row", "block")
]


def test_codes_follow_the_paper_equation() -> None:
    weight = torch.randn(33, 17, generator=torch.Generator().manual_seed(0))
    delta = weight.abs().mean()
    expected = torch.clamp(torch.round(weight / delta), -1, 1)
    w_ternary, scale = quantize_weight(weight, TERNARY)
    assert w_ternary.dtype == torch.int8
    assert torch.equal(w_ternary.float(), expected)
    assert scale == delta


def test_a_tie_rounds_half_to_even() -> None:
    # mean(|w|) = 1, so +-0.5 are ties and round to 0, +-1.5 round to 2 and clip to 1
    weight = torch.tensor([[0.5, -0.5, 1.5, -1.5]])
    w_ternary, scale = quantize_weight(weight, TERNARY)
    assert scale == 1
    assert w_ternary.tolist() == [[0, 0, 1, -1]]


def test_gaussian_weights_are_31_percent_zeros() -> None:
    w_ternary, _ = quantize_weight(torch.randn(512, 512, generator=torch.Generator().manual_seed(1)), TERNARY)
    assert (w_ternary == 0).float().mean() == pytest.approx(0.310, abs=0.005)


def test_an_all_zero_matrix_is_safe() -> None:
    w_ternary, scale = quantize_weight(torch.zeros(4, 4), TERNARY)
    assert not w_ternary.any()
    assert scale == pytest.approx(1e-5)


def test_fake_quantised_weight_is_scale_times_codes() -> None:
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(2))
    w_ternary, scale = quantize_weight(weight, TERNARY)
    assert torch.equal(fake_quantize_weight(weight, TERNARY), scale * w_ternary)


def test_gradient_is_the_identity() -> None:
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(3), requires_grad=True)
    upstream = torch.randn(5, 7, generator=torch.Generator().manual_seed(4))
    fake_quantize_weight(weight, TERNARY).backward(upstream)
    assert weight.grad is not None
    assert torch.equal(weight.grad, upstream)


def test_quantising_twice_keeps_the_codes_but_shrinks_the_scale() -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(5))
    w_ternary, scale = quantize_weight(weight, TERNARY)
    again, smaller = quantize_weight(fake_quantize_weight(weight, TERNARY), TERNARY)
    assert torch.equal(again, w_ternary)
    assert smaller / scale == pytest.approx(float((w_ternary != 0).float().mean()), rel=1e-5)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_each_group_is_quantised_as_a_tensor_of_its_own(quantizer: WeightQuantizer) -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(6)) + 0.1
    weight[2] = 0
    codes, scale = quantize_weight(weight, quantizer)
    width = 32 if quantizer.granularity == "row" else quantizer.block_size
    assert scale.shape == (6, 32 // width)
    alone = WeightQuantizer(grid=quantizer.grid)
    for row in range(6):
        for group in range(32 // width):
            part = weight[row : row + 1, group * width : (group + 1) * width]
            part_codes, part_scale = quantize_weight(part, alone)
            assert torch.equal(codes[row : row + 1, group * width : (group + 1) * width], part_codes)
            assert scale[row, group] == part_scale
    assert torch.equal(fake_quantize_weight(weight, quantizer), codes * spread(scale, 32))


def test_binary_codes_are_the_sign_of_the_zero_centred_weight() -> None:
    weight = torch.randn(9, 20, generator=torch.Generator().manual_seed(7)) + 0.3
    codes, scale = quantize_weight(weight, WeightQuantizer(grid="binary"))
    assert torch.equal(codes.float(), torch.where(weight - weight.mean() > 0, 1.0, -1.0))
    assert scale == weight.abs().sum() / weight.numel()


def test_the_binary_sign_of_zero_is_minus_one() -> None:
    codes, _ = quantize_weight(torch.ones(2, 2), WeightQuantizer(grid="binary"))
    assert codes.eq(-1).all()


def test_blocks_must_divide_a_row() -> None:
    require_divisible(WeightQuantizer(granularity="block", block_size=16), 48, "x")
    with pytest.raises(ValueError, match="layer=x, width=40, weight_block_size=16"):
        require_divisible(WeightQuantizer(granularity="block", block_size=16), 40, "x")


def test_the_least_squares_scale_fits_its_codes_best() -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(8))
    quantizer = WeightQuantizer(scale_rule="least_squares")
    codes, scale = quantize_weight(weight, quantizer)
    assert torch.equal(codes.float(), weight.sign() * (weight.abs() > 0.7 * weight.abs().mean()))
    best = (weight * codes).sum() / codes.square().sum()
    assert scale == pytest.approx(float(best), rel=1e-6)
    absmean_codes, absmean_scale = quantize_weight(weight, TERNARY)
    error = (weight - scale * codes).square().sum() / weight.square().sum()
    assert error < 0.2 < (weight - absmean_scale * absmean_codes).square().sum() / weight.square().sum()


def test_the_least_squares_scale_of_zeros_is_safe() -> None:
    codes, scale = quantize_weight(torch.zeros(2, 16), WeightQuantizer(granularity="row", scale_rule="least_squares"))
    assert not codes.any()
    assert scale.eq(1e-5).all()
