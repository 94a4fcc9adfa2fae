"""Latent weights for given codes and scales, what an initialiser such as GPTQ leaves in a BitLinear.

BitLinear derives codes and absmean scale from its latent weight at every forward, so the two cannot be stored: they
must be what the latent weight quantises to. The plain product scale * codes does not do (its absmean is the scale times
the share of nonzero codes), nor does the original weight, which quantises to its own codes.
"""

from typing import assert_never

import torch
from torch import Tensor

from bitdistill_core.quantize.weight import SCALE_FLOOR, WeightQuantizer

# How far a weight stays from the edge of its bin, in units of the scale. fp32 sums are off by far less.
MARGIN = 0.01


@torch.no_grad()
def latent_weight(
    weight: Tensor, codes: Tensor, scale: Tensor, quantizer: WeightQuantizer, *, margin: float = MARGIN
) -> Tensor:
    """A weight near `weight` that `quantize_weight` turns into exactly `codes` and, to fp32 rounding, `scale`.

    Ternary: a zero is clipped to the zero bin, |w| <= (0.5 - margin) scale, and otherwise keeps its value. The nonzero
    ones of a group become sign * max(|w| + t, (0.5 + margin) scale), |w| counted in the direction of the code; the one
    t is such that the group's mean(|w|) is its scale. Of all weights with these zeros and edges that is the nearest in
    least squares.

    Binary: codes are signs relative to the group's mean, so the mean is made zero. Either sign's weights become
    sign * max(|w - mean| + t, margin * scale) with a t of its own, so that each sign sums to half of size * scale.

    Two kinds of group cannot be had, and the rule is:
    - ternary without a nonzero code (its absmean would be the scale of some nonzero code): the weight is 0 and its
      scale the floor of 1e-5. Scale times codes is the same.
    - binary with one sign only (not all weights are above, or all below, their mean): the code nearest to the other
      sign, the least w for +1 and the greatest for -1, changes sign.

    Args:
        weight: (N, K), finite.
        codes: (N, K), -1, 0, 1; no zeros for a binary grid.
        scale: as `weight_scale` shapes it; at least 1e-5 is used.
        margin: above 0 and below 0.5.
    Returns:
        (N, K) in the dtype of `weight`; the promise holds for fp32.
    Raises:
        ValueError: binary groups of a single weight.
    """
    if quantizer.granularity == "tensor":
        width = weight.numel()
    else:
        width = quantizer.block_size if quantizer.granularity == "block" else weight.shape[1]
    w = weight.double().reshape(-1, width)
    sign = codes.double().reshape(-1, width)
    target = scale.double().reshape(-1, 1).clamp(min=SCALE_FLOOR)
    if quantizer.grid == "ternary":
        latent = _ternary(w, sign, target, margin)
    elif quantizer.grid == "binary":
        latent = _binary(w, sign, target, margin)
    else:
        assert_never(quantizer.grid)
    return latent.reshape(weight.shape).to(weight.dtype)


def _ternary(w: Tensor, codes: Tensor, scale: Tensor, margin: float) -> Tensor:
    zero_edge, nonzero_edge = (0.5 - margin) * scale, (0.5 + margin) * scale
    is_zero = codes == 0
    zeros = torch.where(is_zero, w.clamp(-zero_edge, zero_edge), 0.0)
    total = w.shape[1] * scale - zeros.abs().sum(dim=1, keepdim=True)
    magnitude = _with_sum(w * codes, ~is_zero, nonzero_edge, total)
    return torch.where(is_zero.all(dim=1, keepdim=True), 0.0, zeros + codes * magnitude)


def _binary(w: Tensor, codes: Tensor, scale: Tensor, margin: float) -> Tensor:
    if w.shape[1] < 2:
        raise ValueError(
            f"a binary weight needs at least two weights a scale; got group_size={w.shape[1]}; its sign relative to "
            "the mean is always -1; choose a larger block or granularity tensor"
        )
    codes = _with_both_signs(w, codes)
    magnitude = (w - w.mean(dim=1, keepdim=True)) * codes
    half = w.shape[1] * scale / 2
    above = _with_sum(magnitude, codes > 0, margin * scale, half)
    below = _with_sum(magnitude, codes < 0, margin * scale, half)
    return above - below


def _with_both_signs(w: Tensor, codes: Tensor) -> Tensor:
    same = (codes == codes[:, :1]).all(dim=1, keepdim=True)
    odd = torch.where(codes[:, 0] > 0, w.argmin(dim=1), w.argmax(dim=1))[:, None]
    return torch.where(same, codes.scatter(1, odd, -codes[:, :1]), codes)


def _with_sum(magnitude: Tensor, members: Tensor, floor: Tensor, total: Tensor) -> Tensor:
    """max(magnitude + t, floor) at the members and 0 elsewhere, with the t of each row that makes it sum to `total`.

    The sum is convex, increasing and piecewise linear in t. Newton's method begins where it is not below `total` and
    ends, row by row, when no further member meets the floor. Needs members * floor < total; a row without members is 0.
    """
    active = members.sum(dim=1, keepdim=True).clamp(min=1)
    shift = (total - (magnitude * members).sum(dim=1, keepdim=True)) / active
    while True:
        raised = torch.maximum(magnitude + shift, floor) * members
        left = ((magnitude + shift > floor) & members).sum(dim=1, keepdim=True).clamp(min=1)
        done = left >= active
        if done.all():
            return raised
        shift = torch.where(done, shift, shift - (raised.sum(dim=1, keepdim=True) - total) / left)
        active = torch.where(done, active, left)
