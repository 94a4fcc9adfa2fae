"""AWQ: the error its scales leave, against the definition, and the folding that must not change the float function."""

import pytest
import torch
from torch import Tensor, nn

from bitdistill_core.quantize.awq import COARSE_MULTIPLIERS, channel_scale, clipped_codes, fold
from bitdistill_core.quantize.gptq import nearest_codes, searched_scale
from bitdistill_core.quantize.weight import WeightQuantizer, fake_quantize_weight, quantize_weight, spread

QUANTIZERS = [
    WeightQuantizer(grid=grid, granularity=granularity, block_size=16 if granularity == "block" else 0)
    for grid in ("ternary", "binary")
    for granularity in ("tensor", "row", "block")
]


def outlier_layers(seed: int, num_layers: int = 1) -> tuple[Tensor, list[Tensor]]:
    """Inputs with every ninth channel 10 times as large, and weights that are smaller there, as trained ones are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(500, 64, generator=generator)
    weights = [torch.randn(24, 64, generator=generator) for _ in range(num_layers)]
    x[:, ::9] *= 10
    for weight in weights:
        weight[:, ::9] *= 0.3
    return x, weights


def output_error(x: Tensor, weight: Tensor, s: Tensor, quantizer: WeightQuantizer) -> float:
    """Of the weight rounded with a searched scale, on the activations themselves."""
    importance = (x / s).square().sum(dim=0)
    scale = spread(searched_scale(weight * s, importance, quantizer, COARSE_MULTIPLIERS), weight.shape[1])
    return float((x @ weight.T - (x / s) @ (scale * nearest_codes(weight * s, scale, quantizer)).T).square().sum())


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_outlier_channels_are_scaled_up_and_the_error_falls(quantizer: WeightQuantizer) -> None:
    x, [weight] = outlier_layers(seed=0)
    s = channel_scale([weight], x.T @ x, x.abs().mean(dim=0), quantizer)
    outliers = torch.arange(64) % 9 == 0
    assert s.dtype == torch.float32
    assert s[outliers].min() > 1.5 * s[~outliers].max()
    assert output_error(x, weight, s, quantizer) < 0.8 * output_error(x, weight, torch.ones(64), quantizer)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_alpha_is_the_best_of_twenty_for_all_layers_together(quantizer: WeightQuantizer) -> None:
    x, weights = outlier_layers(seed=1, num_layers=3)
    magnitude = x.abs().mean(dim=0)
    candidates = []
    for step in range(20):
        s = magnitude ** (step / 20)
        s = s / (s.max() * s.min()) ** 0.5
        candidates.append((sum(output_error(x, weight, s, quantizer) for weight in weights), s))
    expected = min(candidates, key=lambda pair: pair[0])[1]
    assert torch.allclose(channel_scale(weights, x.T @ x, magnitude, quantizer), expected, rtol=1e-5)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_clipping_rounds_with_less_error_than_absmean(quantizer: WeightQuantizer) -> None:
    x, [weight] = outlier_layers(seed=5)
    codes, scale = clipped_codes(weight, x.T @ x, quantizer)
    assert codes.dtype == torch.int8
    assert scale.shape == quantize_weight(weight, quantizer)[1].shape
    error = (x @ (weight - spread(scale, 64) * codes).T).square().sum()
    absmean_error = (x @ (weight - fake_quantize_weight(weight, quantizer)).T).square().sum()
    assert error < (0.9 if quantizer.grid == "ternary" else 1.0) * absmean_error


def test_inputs_of_one_magnitude_are_not_scaled() -> None:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(2))
    s = channel_scale([weight], torch.eye(16), torch.full((16,), 0.8), WeightQuantizer())
    assert torch.allclose(s, torch.ones(16))


def test_dead_channels_and_dead_inputs_are_safe() -> None:
    x, [weight] = outlier_layers(seed=3)
    x[:, 5] = 0
    s = channel_scale([weight], x.T @ x, x.abs().mean(dim=0), WeightQuantizer())
    assert torch.isfinite(s).all()
    assert (s > 0).all()
    assert torch.equal(channel_scale([weight], torch.zeros(64, 64), torch.zeros(64), WeightQuantizer()), torch.ones(64))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_folding_leaves_the_product_of_norm_and_linears(offset: float) -> None:
    generator = torch.Generator().manual_seed(4)
    norm = nn.RMSNorm(12)
    linears = [nn.Linear(12, 5), nn.Linear(12, 7, bias=False)]
    x, s = torch.randn(9, 12, generator=generator), torch.rand(12, generator=generator) + 0.2
    with torch.no_grad():
        norm.weight.copy_(torch.randn(12, generator=generator))

    def outputs() -> list[Tensor]:
        normed = nn.functional.rms_norm(x, (12,)) * (offset + norm.weight)
        return [linear(normed) for linear in linears]

    before = outputs()
    fold(s, linears, norm, norm_offset=offset)
    for old, new in zip(before, outputs(), strict=True):
        assert torch.allclose(old, new, atol=1e-5)
