"""GPTQ (Frantar et al., arXiv 2210.17323) onto the ternary or binary grid: calibrated, with error compensation.

BitDistill's Table 4 names a variant GPTQ, but the authors' code for it is a rescaling by column variances without
calibration data or Hessian. This is the real one.
"""

from collections.abc import Sequence
from typing import assert_never

import torch
from torch import Tensor

from bitdistill_core.quantize.weight import SCALE_FLOOR, WeightQuantizer, over_groups, spread, weight_scale

LAZY_BLOCK = 128  # columns between two updates of all later columns
# of the absmean, itself first; the least-squares ternary scale of Gaussian weights is 1.53 of it
SCALE_MULTIPLIERS = (1.0, *(0.6 + 0.05 * i for i in range(33)))


@torch.no_grad()
def gptq(weight: Tensor, hessian: Tensor, quantizer: WeightQuantizer, *, damp: float = 0.01) -> tuple[Tensor, Tensor]:
    """Codes and scale of a weight matrix that keep its output on the calibration tokens.

    Both minimise tr((W - scale * codes) H (W - scale * codes)^T), H the Hessian: the scale by `searched_scale`, the
    codes by `compensated_codes`.

    Args:
        weight: (N, K), any float dtype. Computed in fp32.
        hessian: (K, K), the sum of x x^T over the calibration tokens, x the input the weight multiplies.
        damp: see `compensated_codes`.
    Returns:
        codes (N, K) int8; scale fp32 as `weight_scale` shapes it, to be multiplied.
    """
    scale = searched_scale(weight, hessian.diagonal(), quantizer)
    return compensated_codes(weight, hessian, scale, quantizer, damp=damp), scale


@torch.no_grad()
def searched_scale(
    weight: Tensor,
    importance: Tensor,
    quantizer: WeightQuantizer,
    multipliers: Sequence[float] = SCALE_MULTIPLIERS,
) -> Tensor:
    """The multiple of the absmean scale that rounds each group best, shaped as `weight_scale` shapes it.

    Of `multipliers` the one with the least sum of importance * (w - scale * code)^2, code the nearest.
    `importance` (K,) is the diagonal of the Hessian. Absmean itself is among them. On the ternary grid absmean is
    far from the least-squares scale, and with it GPTQ leaves about twice the error.
    """
    weight = weight.float()
    importance = importance.float().clamp(min=importance.float().mean() * 1e-6)
    absmean = weight_scale(weight, quantizer)
    best = absmean.clone()
    least = torch.full_like(absmean, torch.inf)
    for multiplier in multipliers:
        scale = (absmean * multiplier).clamp_(min=SCALE_FLOOR)
        per_weight = spread(scale, weight.shape[1])
        error = (weight - per_weight * nearest_codes(weight, per_weight, quantizer)).square_().mul_(importance)
        error = over_groups(error, quantizer, torch.sum)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


@torch.no_grad()
def compensated_codes(
    weight: Tensor,
    hessian: Tensor,
    scale: Tensor,
    quantizer: WeightQuantizer,
    *,
    damp: float = 0.01,
    act_order: bool = True,
) -> Tensor:
    """GPTQ's codes (N, K) int8 on the grid of `scale`, Algorithm 1 of arXiv 2210.17323.

    Column after column takes its nearest code, and its error (w - scale * code) / U_jj is subtracted from the columns
    to come, times row j of U, where H^-1 = U^T U (U upper triangular). Columns beyond a block of 128 are updated once a
    block. The scale is fixed before, so that columns may go in any order under every granularity. A column whose input
    is always zero takes its nearest code and hands on no error.

    Args:
        damp: times the mean of H's diagonal, added to the diagonal. Above 0.
        act_order: begin with the columns whose input is largest, by the diagonal of H.
    """
    in_features = weight.shape[1]
    diagonal = hessian.diagonal()
    order = torch.arange(in_features, device=weight.device)
    if act_order:
        order = diagonal.argsort(descending=True, stable=True)
    factor = _inverse_factor(hessian[order][:, order], damp)
    scales = spread(scale.float(), in_features).expand(weight.shape)[:, order].T
    columns = weight.float()[:, order].T.contiguous()  # (K, N): a column of the weight lies together
    codes = torch.empty_like(columns, dtype=torch.int8)
    for start in range(0, in_features, LAZY_BLOCK):
        stop = min(start + LAZY_BLOCK, in_features)
        errors = torch.empty_like(columns[start:stop])
        for j in range(start, stop):
            code = nearest_codes(columns[j], scales[j], quantizer)
            codes[j] = code.to(torch.int8)
            errors[j - start] = (columns[j] - scales[j] * code) / factor[j, j]
            columns[j:stop] -= torch.outer(factor[j, j:stop], errors[j - start])
        columns[stop:] -= factor[start:stop, stop:].T @ errors
    unordered = torch.empty_like(codes)
    unordered[order] = codes
    return unordered.T.contiguous()


def nearest_codes(weight: Tensor, scale: Tensor, quantizer: WeightQuantizer) -> Tensor:
    """The nearest points of the grid {-1, 0, 1} or {-1, 1} to weight / scale, in the dtype of `weight`.

    For binary that is the sign, -1 at zero. BitNet's own codes subtract the mean first, and so are not the nearest.
    """
    if quantizer.grid == "ternary":
        return (weight / scale).round_().clamp_(-1, 1)
    if quantizer.grid == "binary":
        return torch.where(weight > 0, 1.0, -1.0)
    assert_never(quantizer.grid)


def _inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """U (K, K) fp32, upper triangular with U^T U = (H + damp * mean(diag H))^-1. In fp64.

    H = V V^T with V upper triangular is Cholesky's factor of H reversed in rows and columns, and U = V^-1.
    """
    if damp <= 0:
        raise ValueError(
            f"GPTQ's damp must be above 0, or dead inputs leave no inverse; got damp={damp}; 0.01 is usual"
        )
    damped = hessian.double()
    ridge = damp * damped.diagonal().mean()
    damped = damped + torch.eye(len(damped), dtype=damped.dtype, device=damped.device) * (ridge if ridge > 0 else 1.0)
    lower: Tensor = torch.linalg.cholesky(damped.flip(0, 1))
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True).float()
