"""Ternary weights against BitDistill Eq. 1-2."""

import pytest
import torch

from bitdistill_core.quantize.ternary import fake_quantize_weight, quantize_weight


def test_codes_follow_the_paper_equation() -> None:
    weight = torch.randn(33, 17, generator=torch.Generator().manual_seed(0))
    delta = weight.abs().mean()
    expected = torch.clamp(torch.round(weight / delta), -1, 1)
    w_ternary, scale = quantize_weight(weight)
    assert w_ternary.dtype == torch.int8
    assert torch.equal(w_ternary.float(), expected)
    assert scale == delta


def test_a_tie_rounds_half_to_even() -> None:
    # mean(|w|) = 1, so +-0.5 are ties and round to 0, +-1.5 round to 2 and clip to 1
    weight = torch.tensor([[0.5, -0.5, 1.5, -1.5]])
    w_ternary, scale = quantize_weight(weight)
    assert scale == 1
    assert w_ternary.tolist() == [[0, 0, 1, -1]]


def test_gaussian_weights_are_31_percent_zeros() -> None:
    w_ternary, _ = quantize_weight(torch.randn(512, 512, generator=torch.Generator().manual_seed(1)))
    assert (w_ternary == 0).float().mean() == pytest.approx(0.310, abs=0.005)


def test_an_all_zero_matrix_is_safe() -> None:
    w_ternary, scale = quantize_weight(torch.zeros(4, 4))
    assert not w_ternary.any()
    assert scale == pytest.approx(1e-5)


def test_fake_quantised_weight_is_scale_times_codes() -> None:
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(2))
    w_ternary, scale = quantize_weight(weight)
    assert torch.equal(fake_quantize_weight(weight), scale * w_ternary)


def test_gradient_is_the_identity() -> None:
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(3), requires_grad=True)
    upstream = torch.randn(5, 7, generator=torch.Generator().manual_seed(4))
    fake_quantize_weight(weight).backward(upstream)
    assert weight.grad is not None
    assert torch.equal(weight.grad, upstream)


def test_quantising_twice_keeps_the_codes_but_shrinks_the_scale() -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(5))
    w_ternary, scale = quantize_weight(weight)
    again, smaller = quantize_weight(fake_quantize_weight(weight))
    assert torch.equal(again, w_ternary)
    assert smaller / scale == pytest.approx(float((w_ternary != 0).float().mean()), rel=1e-5)
