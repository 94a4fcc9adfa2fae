"""INT8 activations against BitDistill Eq. 3."""

import torch

from bitdistill_core.quantize.activation import fake_quantize_activation, quantize_activation


def test_codes_follow_the_paper_equation_per_token() -> None:
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    absmax = x.abs().amax(-1, keepdim=True)
    expected = torch.clamp(torch.round(x * (127 / absmax)), -128, 127)
    x_int8, scale = quantize_activation(x)
    assert x_int8.dtype == torch.int8
    assert scale.shape == (3, 5, 1)
    assert torch.equal(x_int8.float(), expected)
    assert torch.allclose(scale, absmax / 127)


def test_a_tie_rounds_half_to_even() -> None:
    x_int8, _ = quantize_activation(torch.tensor([[127.0, 0.5, 1.5, -2.5]]))
    assert x_int8.tolist() == [[127, 0, 2, -2]]


def test_an_all_zero_token_is_safe() -> None:
    x_int8, scale = quantize_activation(torch.zeros(1, 4))
    assert not x_int8.any()
    assert torch.isfinite(scale).all()


def test_error_is_at_most_half_a_step() -> None:
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    _, scale = quantize_activation(x)
    assert ((fake_quantize_activation(x) - x).abs() <= 0.5001 * scale).all()


def test_gradient_is_the_identity() -> None:
    x = torch.randn(4, 6, requires_grad=True, generator=torch.Generator().manual_seed(2))
    upstream = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
    fake_quantize_activation(x).backward(upstream)
    assert x.grad is not None
    assert torch.equal(x.grad, upstream)


def test_bfloat16_keeps_its_dtype() -> None:
    assert fake_quantize_activation(torch.ones(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
