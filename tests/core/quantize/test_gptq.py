"""GPTQ against a direct optimal brain quantiser, and against rounding to nearest where it must and must not differ."""

import pytest
import torch
from torch import Tensor

from bitdistill_core.quantize.gptq import compensated_codes, gptq, nearest_codes, searched_scale
from bitdistill_core.quantize.weight import WeightQuantizer, quantize_weight, spread, weight_scale

QUANTIZERS = [
    WeightQuantizer(grid=grid, granularity=granularity, block_size=8 if granularity == "block" else 0)
    for grid in ("ternary", "binary")
    for granularity in ("tensor", "row", "block")
]


def correlated_inputs(num_tokens: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * torch.arange(1, width + 1) ** -0.7
    return torch.randn(num_tokens, width, generator=generator) @ mixing.T


def error(weight: Tensor, codes: Tensor, scale: Tensor, hessian: Tensor) -> float:
    difference = weight - spread(scale, weight.shape[1]) * codes
    return float(((difference @ hessian) * difference).sum())


def brain_quantizer(
    weight: Tensor, hessian: Tensor, scale: Tensor, quantizer: WeightQuantizer, damp: float, order: list[int]
) -> Tensor:
    """Optimal brain quantisation row by row in a given order: Eq. 2 and 3 of arXiv 2210.17323, inverses anew."""
    num_rows, width = weight.shape
    damped = hessian.double() + damp * hessian.double().diagonal().mean() * torch.eye(width)
    scales = spread(scale, width).expand(num_rows, width).double()
    codes = torch.zeros(num_rows, width, dtype=torch.int8)
    for row in range(num_rows):
        w = weight[row].double().clone()
        left = list(order)
        while left:
            inverse = torch.linalg.inv(damped[left][:, left])
            j = left[0]
            code = nearest_codes(w[j], scales[row, j], quantizer)
            codes[row, j] = int(code)
            w[left] -= (w[j] - scales[row, j] * code) / inverse[0, 0] * inverse[0]
            left.pop(0)
    return codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_codes_are_those_of_the_direct_brain_quantizer(quantizer: WeightQuantizer, act_order: bool) -> None:
    x = correlated_inputs(200, 48, seed=0)
    hessian = x.T @ x
    weight = torch.randn(5, 48, generator=torch.Generator().manual_seed(1))
    scale = weight_scale(weight, quantizer)
    order = hessian.diagonal().argsort(descending=True).tolist() if act_order else list(range(48))
    expected = brain_quantizer(weight, hessian, scale, quantizer, 0.01, order)
    found = compensated_codes(weight, hessian, scale, quantizer, damp=0.01, act_order=act_order)
    assert found.dtype == torch.int8
    assert torch.equal(found, expected)


def test_lazy_blocks_do_not_change_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    x = correlated_inputs(900, 300, seed=2)
    weight = torch.randn(7, 300, generator=torch.Generator().manual_seed(3))
    scale = weight_scale(weight, WeightQuantizer())
    codes = compensated_codes(weight, x.T @ x, scale, WeightQuantizer())
    monkeypatch.setattr("bitdistill_core.quantize.gptq.LAZY_BLOCK", 300)
    at_once = compensated_codes(weight, x.T @ x, scale, WeightQuantizer())
    assert (codes != at_once).float().mean() < 0.005  # fp32 sums in another order may flip a tie


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_a_diagonal_hessian_gives_the_nearest_codes(quantizer: WeightQuantizer) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(9, 64, generator=generator)
    hessian = torch.diag(torch.rand(64, generator=generator) + 0.1)
    codes, scale = gptq(weight, hessian, quantizer)
    assert torch.equal(codes, nearest_codes(weight, spread(scale, 64), quantizer).to(torch.int8))
    if quantizer.grid == "ternary":
        absmean_codes, absmean = quantize_weight(weight, quantizer)
        assert torch.equal(compensated_codes(weight, hessian, absmean, quantizer), absmean_codes)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_correlated_inputs_leave_less_error_than_rounding(quantizer: WeightQuantizer) -> None:
    x = correlated_inputs(1000, 160, seed=5)
    hessian = x.T @ x
    weight = torch.randn(40, 160, generator=torch.Generator().manual_seed(6))
    rounded = error(weight, *quantize_weight(weight, quantizer), hessian)
    absmean = weight_scale(weight, quantizer)
    compensated = error(weight, compensated_codes(weight, hessian, absmean, quantizer), absmean, hessian)
    assert compensated < 0.6 * rounded
    assert error(weight, *gptq(weight, hessian, quantizer), hessian) < (
        0.6 if quantizer.grid == "ternary" else 1.05
    ) * (compensated)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_the_searched_scale_is_the_best_of_its_group(quantizer: WeightQuantizer) -> None:
    generator = torch.Generator().manual_seed(7)
    weight, importance = torch.randn(6, 32, generator=generator), torch.rand(32, generator=generator) + 0.5
    scale = searched_scale(weight, importance, quantizer)
    absmean = weight_scale(weight, quantizer)
    assert scale.shape == absmean.shape
    hessian = torch.diag(importance)
    least = error(weight, nearest_codes(weight, spread(scale, 32), quantizer), scale, hessian)
    for multiplier in (0.7, 0.9, 1.0, 1.2, 1.5, 2.0):
        other = multiplier * absmean
        assert least <= error(weight, nearest_codes(weight, spread(other, 32), quantizer), other, hessian) * (1 + 1e-5)


def test_dead_inputs_take_their_nearest_code_and_hand_on_nothing() -> None:
    x = correlated_inputs(300, 40, seed=8)
    dead = torch.tensor([0, 7, 39])
    alive = torch.tensor([j for j in range(40) if j not in dead])
    x[:, dead] = 0
    hessian = x.T @ x
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(9))
    scale = weight_scale(weight, WeightQuantizer())
    codes = compensated_codes(weight, hessian, scale, WeightQuantizer())
    assert torch.equal(codes[:, dead], nearest_codes(weight, scale, WeightQuantizer()).to(torch.int8)[:, dead])
    damp = 0.01 * float(hessian.diagonal().mean() / hessian[alive][:, alive].diagonal().mean())
    without = compensated_codes(weight[:, alive], hessian[alive][:, alive], scale, WeightQuantizer(), damp=damp)
    assert torch.equal(codes[:, alive], without)


def test_an_input_that_is_always_zero_is_safe() -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(10))
    codes, scale = gptq(weight, torch.zeros(8, 8), WeightQuantizer())
    assert torch.equal(codes, nearest_codes(weight, scale, WeightQuantizer()).to(torch.int8))


def test_damp_must_be_above_zero() -> None:
    with pytest.raises(ValueError, match=r"above 0, or dead inputs leave no inverse; got damp=0"):
        gptq(torch.ones(2, 2), torch.eye(2), WeightQuantizer(), damp=0)
