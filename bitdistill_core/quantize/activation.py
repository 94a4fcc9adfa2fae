"""Per-token absmax INT8 activations (BitDistill Eq. 3)."""

import torch
from torch import Tensor

from bitdistill_core.quantize.fused import fused
from bitdistill_core.quantize.straight_through import straight_through

ABSMAX_FLOOR = 1e-5


@torch.no_grad()
def quantize_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 codes and absmax scale of each token.

    x_int8 = clip(round(x / activation_scale), -128, 127), activation_scale = absmax / 127, so that
    x ~ activation_scale * x_int8. BitDistill Eq. 3. Rounds half to even; the absmax has a floor of 1e-5.

    Args:
        x: (..., K), any float dtype. Computed in fp32.
    Returns:
        x_int8 (..., K) int8; activation_scale (..., 1) fp32.
    """
    absmax = x.float().abs().amax(dim=-1, keepdim=True).clamp_(min=ABSMAX_FLOOR)
    return (x.float() * (127.0 / absmax)).round_().clamp_(-128, 127).to(torch.int8), absmax / 127.0


def fake_quantize_activation(x: Tensor) -> Tensor:
    """`activation_scale * x_int8` in the dtype of `x`, with the straight-through gradient."""
    with torch.no_grad():
        quantized = _rounded(x.detach())
    return straight_through(x, quantized)


@fused
def _rounded(x: Tensor) -> Tensor:
    absmax = x.float().abs().amax(dim=-1, keepdim=True).clamp_(min=ABSMAX_FLOOR)
    return (x.float() * (127.0 / absmax)).round_().clamp_(-128, 127).mul_(absmax / 127.0).to(x.dtype)
