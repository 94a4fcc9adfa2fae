"""Absmean ternary weights (BitDistill Eq. 1-2), one scale a tensor."""

import torch
from torch import Tensor

from bitdistill_core.quantize.straight_through import straight_through

SCALE_FLOOR = 1e-5


def weight_scale(weight: Tensor) -> Tensor:
    """Absmean scale of a weight matrix, () fp32: mean(|weight|), at least 1e-5. BitDistill Eq. 2 [Delta].

    The paper adds epsilon to the divisor; we floor the scale, as the authors' code does.
    """
    return weight.float().abs().mean().clamp_(min=SCALE_FLOOR)


@torch.no_grad()
def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Ternary codes and absmean scale of a weight matrix.

    w_ternary = clip(round(weight / weight_scale), -1, 1), so that weight ~ weight_scale * w_ternary.
    BitDistill Eq. 1-2. Rounds half to even.

    Args:
        weight: (N, K), any float dtype. Computed in fp32.
    Returns:
        w_ternary (N, K) int8; weight_scale () fp32, at least 1e-5, so an all-zero matrix is safe.
    """
    scale = weight_scale(weight)
    return (weight.float() / scale).round_().clamp_(-1, 1).to(torch.int8), scale


def fake_quantize_weight(weight: Tensor) -> Tensor:
    """`weight_scale * w_ternary` in the dtype of `weight`, with the straight-through gradient."""
    with torch.no_grad():
        scale = weight_scale(weight)
        quantized = (weight.float() / scale).round_().clamp_(-1, 1).mul_(scale).to(weight.dtype)
    return straight_through(weight, quantized)
