"""Latent weights: whatever codes and scale are asked for, absmean quantisation must return them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitdistill_core.choices import Grid
from bitdistill_core.quantize.latent import MARGIN, latent_weight
from bitdistill_core.quantize.weight import SCALE_FLOOR, WeightQuantizer, quantize_weight, weight_scale

QUANTIZERS = [
    WeightQuantizer(grid=grid, granularity=granularity, block_size=8 if granularity == "block" else 0)
    for grid in ("ternary", "binary")
    for granularity in ("tensor", "row", "block")
]


def groups(x: Tensor, quantizer: WeightQuantizer) -> Tensor:
    width = {"tensor": x.numel(), "row": x.shape[1], "block": quantizer.block_size}[quantizer.granularity]
    return x.reshape(-1, width)


def random_codes(grid: Grid, shape: tuple[int, int], density: float, generator: torch.Generator) -> Tensor:
    signs = torch.where(torch.rand(shape, generator=generator) < density, 1, -1)
    if grid == "ternary":
        signs = signs * (torch.rand(shape, generator=generator) < density)
    return signs.to(torch.int8)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 9),
    blocks=st.integers(1, 12),
    density=st.floats(0.02, 0.98),
    offset=st.floats(-3, 3),
    magnitude=st.floats(1e-3, 1e3),
    multiplier=st.floats(0.2, 5),
)
def test_any_codes_and_scale_are_what_it_quantises_to(
    quantizer: WeightQuantizer,
    seed: int,
    rows: int,
    blocks: int,
    density: float,
    offset: float,
    magnitude: float,
    multiplier: float,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = magnitude * (torch.randn(rows, 8 * blocks, generator=generator) + offset)
    weight[torch.rand(weight.shape, generator=generator) < 0.1] = 0
    codes = random_codes(quantizer.grid, (rows, 8 * blocks), density, generator)
    scale = multiplier * weight_scale(weight, quantizer)
    latent = latent_weight(weight, codes, scale, quantizer)
    found_codes, found_scale = quantize_weight(latent, quantizer)
    grouped = groups(codes, quantizer)
    dead = (grouped == 0).all(dim=1)
    same = (grouped == grouped[:, :1]).all(dim=1) & ~dead
    possible = torch.ones_like(dead) if quantizer.grid == "ternary" else ~same
    assert torch.equal(groups(found_codes, quantizer)[possible], grouped[possible])
    # one code of a binary group without both signs must give way
    assert ((groups(found_codes, quantizer) != grouped).sum(dim=1) == (~possible).int()).all()
    expected_scale = torch.where(dead, SCALE_FLOOR, scale.flatten())
    assert torch.allclose(found_scale.flatten(), expected_scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_its_own_codes_and_scale_leave_a_weight_almost_as_it_is(quantizer: WeightQuantizer) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    if quantizer.grid == "binary":
        grouped = groups(weight, quantizer)
        weight = (grouped - grouped.mean(dim=1, keepdim=True)).reshape(weight.shape)
    latent = latent_weight(weight, *quantize_weight(weight, quantizer), quantizer)
    assert (latent - weight).abs().max() < 2 * MARGIN * weight.abs().mean()


def test_it_is_the_nearest_of_those_that_quantise_so() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(1, 40, generator=generator, dtype=torch.float64)
    codes = random_codes("ternary", (1, 40), 0.6, generator)
    scale = 1.3 * weight.abs().mean()
    latent = latent_weight(weight, codes, scale, WeightQuantizer())
    nonzero = codes != 0
    assert torch.equal(latent[~nonzero], weight[~nonzero].clamp(-0.49 * scale, 0.49 * scale))
    edge = (0.5 + MARGIN) * scale
    magnitude, wanted = (latent * codes)[nonzero], (weight * codes)[nonzero]
    moved = (magnitude - wanted)[magnitude > edge * (1 + 1e-9)]
    # Karush-Kuhn-Tucker: one multiplier for all inside, and at the edge only those that it would push beyond
    assert torch.allclose(moved, moved[0], rtol=1e-9)
    assert (wanted[magnitude <= edge * (1 + 1e-9)] + moved[0] <= edge * (1 + 1e-9)).all()
    assert latent.abs().mean() == pytest.approx(float(scale), rel=1e-12)


def test_a_ternary_group_of_zeros_gets_the_least_scale() -> None:
    weight, codes = torch.randn(2, 8, generator=torch.Generator().manual_seed(3)), torch.zeros(2, 8, dtype=torch.int8)
    codes[1, 3] = -1
    latent = latent_weight(weight, codes, torch.tensor([[0.5], [0.25]]), WeightQuantizer(granularity="row"))
    assert not latent[0].any()
    found, scale = quantize_weight(latent, WeightQuantizer(granularity="row"))
    assert torch.equal(found, codes)
    assert scale.flatten().tolist() == pytest.approx([SCALE_FLOOR, 0.25])


def test_a_binary_group_of_one_sign_gives_its_nearest_code_away() -> None:
    weight = torch.tensor([[3.0, 1.0, 2.0, 5.0]])
    for sign, odd in ((1, 1), (-1, 3)):
        codes = torch.full((1, 4), sign, dtype=torch.int8)
        latent = latent_weight(weight, codes, torch.tensor(1.5), WeightQuantizer(grid="binary"))
        codes[0, odd] = -sign
        found, scale = quantize_weight(latent, WeightQuantizer(grid="binary"))
        assert torch.equal(found, codes)
        assert scale == pytest.approx(1.5)


def test_a_binary_group_of_one_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least two weights a scale; got group_size=1"):
        latent_weight(
            torch.ones(3, 1),
            torch.ones(3, 1, dtype=torch.int8),
            torch.ones(3, 1),
            WeightQuantizer(grid="binary", granularity="row"),
        )
