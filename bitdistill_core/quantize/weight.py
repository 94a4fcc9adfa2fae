"""Weight quantisers of BitLinear: which grid, and which weights share a scale.

Ternary is absmean, BitDistill Eq. 1-2. Binary is BitNet's: the sign of the zero-centred weight (arXiv 2310.11453,
Eq. 1-3). Either has one scale a tensor, a row, or a block of consecutive weights of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from bitdistill_core.choices import Granularity, Grid, ScaleRule
from bitdistill_core.quantize.fused import fused
from bitdistill_core.quantize.straight_through import straight_through

SCALE_FLOOR = 1e-5

TWN_THRESHOLD = 0.7  # of the absmean: close to the best threshold of normal and of uniform weights


@dataclass(frozen=True)
class WeightQuantizer:
    """How the weights of a student become codes."""

    grid: Grid = "ternary"
    granularity: Granularity = "tensor"
    block_size: int = 0  # weights of a row that share a scale; for granularity block only
    scale_rule: ScaleRule = "absmean"  # least_squares: Ternary Weight Networks (arXiv 1605.04711), ternary only


def require_divisible(quantizer: WeightQuantizer, in_features: int, name: str) -> None:
    """Raises ValueError when the blocks do not divide a row of the layer `name`."""
    if quantizer.granularity == "block" and in_features % quantizer.block_size:
        raise ValueError(
            f"surgery.weight_block_size must divide every layer's input width; got layer={name}, width={in_features}, "
            f"weight_block_size={quantizer.block_size}"
        )


def weight_scale(weight: Tensor, quantizer: WeightQuantizer) -> Tensor:
    """Absmean of the weights that share a scale, fp32: (), (N, 1) or (N, K / block_size). BitDistill Eq. 2 [Delta].

    At least 1e-5: the paper adds epsilon to the divisor, we floor the scale, as the authors' code does.
    """
    return over_groups(weight.detach().float().abs(), quantizer, torch.mean).clamp_(min=SCALE_FLOOR)


@torch.no_grad()
def quantize_weight(weight: Tensor, quantizer: WeightQuantizer) -> tuple[Tensor, Tensor]:
    """Codes and scale of a weight matrix, weight ~ spread(weight_scale) * codes.

    Ternary: clip(round(weight / weight_scale), -1, 1), rounding half to even. With scale_rule least_squares: the sign
    where |weight| > 0.7 absmean, else 0, and the scale that fits these codes best, the mean |weight| of the nonzero
    ones. Binary: the sign of weight minus the mean of the weights that share its scale, and -1 at zero.

    Args:
        weight: (N, K), any float dtype. Computed in fp32.
    Returns:
        codes (N, K) int8; weight_scale fp32, shaped as the function `weight_scale` gives it.
    """
    codes, scale = _quantized(weight.detach().float(), quantizer)
    return codes.to(torch.int8), scale


def fake_quantize_weight(weight: Tensor, quantizer: WeightQuantizer) -> Tensor:
    """`spread(weight_scale) * codes` in the dtype of `weight`, with the straight-through gradient."""
    with torch.no_grad():
        quantized = _rounded(weight.detach(), quantizer)  # what is compiled for a Parameter is of one shape
    return straight_through(weight, quantized)


@fused
def _rounded(weight: Tensor, quantizer: WeightQuantizer) -> Tensor:
    codes, scale = _quantized(weight.float(), quantizer)
    return codes.mul_(spread(scale, weight.shape[1])).to(weight.dtype)


def spread(scale: Tensor, in_features: int) -> Tensor:
    """A scale as it multiplies a weight (N, K): (), (N, 1), or a block's scale repeated to (N, K)."""
    if scale.dim() == 2 and scale.shape[1] > 1:
        return scale.repeat_interleave(in_features // scale.shape[1], dim=1)
    return scale


def _quantized(weight: Tensor, quantizer: WeightQuantizer) -> tuple[Tensor, Tensor]:
    """Codes in float, and their scale."""
    scale = weight_scale(weight, quantizer)
    if quantizer.grid == "binary":
        centre = spread(over_groups(weight, quantizer, torch.mean), weight.shape[1])
        return torch.where(weight > centre, 1.0, -1.0), scale
    if quantizer.grid != "ternary":
        assert_never(quantizer.grid)
    if quantizer.scale_rule == "absmean":
        return (weight / spread(scale, weight.shape[1])).round_().clamp_(-1, 1), scale
    if quantizer.scale_rule != "least_squares":
        assert_never(quantizer.scale_rule)
    is_kept = weight.abs() > TWN_THRESHOLD * spread(scale, weight.shape[1])
    total = over_groups(weight.abs() * is_kept, quantizer, torch.mean)
    share = over_groups(is_kept.float(), quantizer, torch.mean)
    return weight.sign() * is_kept, (total / share.clamp_(min=1e-9)).clamp_(min=SCALE_FLOOR)


def over_groups(values: Tensor, quantizer: WeightQuantizer, reduce: Callable[..., Tensor]) -> Tensor:
    """`reduce` (torch.mean, torch.sum) over the weights that share a scale: (), (N, 1) or (N, K / block_size)."""
    if quantizer.granularity == "tensor":
        return reduce(values)
    if quantizer.granularity == "row":
        return reduce(values, dim=1, keepdim=True)
    if quantizer.granularity == "block":
        return reduce(values.unflatten(1, (-1, quantizer.block_size)), dim=2)
    assert_never(quantizer.granularity)
