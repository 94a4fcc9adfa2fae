"""AWQ (Lin et al., arXiv 2306.00978): input channels scaled by their activations, then weights clipped and rounded.

BitDistill's Table 4 names a variant AWQ, but the authors' code for it multiplies the scale of some rows by 0.7 and of
the others by 1.2, without calibration data. This is the real one. Clipping here is the choice of the scale, a multiple
of the absmean: absmean itself is so far below the least-squares scale that ternary gains nothing from scaled channels.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from bitdistill_core.quantize.gptq import nearest_codes, searched_scale
from bitdistill_core.quantize.weight import WeightQuantizer, spread

NUM_ALPHAS = 20
COARSE_MULTIPLIERS = (1.0, 0.8, 1.2, 1.4, 1.6, 1.8, 2.0)  # of the absmean, while alpha is searched


@torch.no_grad()
def channel_scale(
    weights: Sequence[Tensor], gram: Tensor, mean_magnitude: Tensor, quantizer: WeightQuantizer
) -> Tensor:
    """AWQ's scale of each input channel, s (K,) fp32: weights take W diag(s), their common input takes 1 / s.

    s_c = mean|x_c|^alpha / sqrt(max * min of these), Eq. 5 of arXiv 2306.00978 and the normalisation of its code. Of
    alpha = 0, 0.05, ... 0.95 the one with the least error ||X W^T - (X / s) Q(W diag(s))^T||^2, summed over weights;
    Q rounds with the best of a few multiples of the absmean scale. alpha = 0 is no scaling. A channel below 1e-4 of the
    largest, such as a dead one, counts as that.

    Args:
        weights: each (N_i, K); all multiply the same input.
        gram: (K, K), the sum of x x^T over the calibration tokens.
        mean_magnitude: (K,), mean|x_c| over the calibration tokens.
    """
    if not mean_magnitude.any():
        return torch.ones_like(mean_magnitude, dtype=torch.float32)
    importance = mean_magnitude.float().clamp(min=mean_magnitude.max().float() * 1e-4)
    best, least = torch.ones_like(importance), torch.inf
    for step in range(NUM_ALPHAS):
        s = importance.pow(step / NUM_ALPHAS)
        s = s / (s.max() * s.min()).sqrt()
        error = sum(_error(weight.float(), s, gram, quantizer) for weight in weights)
        if error < least:
            best, least = s, error
    return best


@torch.no_grad()
def clipped_codes(weight: Tensor, gram: Tensor, quantizer: WeightQuantizer) -> tuple[Tensor, Tensor]:
    """Codes (N, K) int8 and scale: the nearest, with the `searched_scale` for inputs of this Gram matrix (K, K)."""
    scale = searched_scale(weight, gram.diagonal(), quantizer)
    return nearest_codes(weight.float(), spread(scale, weight.shape[1]), quantizer).to(torch.int8), scale


@torch.no_grad()
def fold(s: Tensor, linears: Iterable[nn.Module], norm: nn.Module, *, norm_offset: float) -> None:
    """Multiplies the input channels of each linear's weight (N, K) by s (K,) and divides the gain of `norm` by it.

    `linears` must be all that read the norm's output. The norm multiplies by norm_offset + weight, 1 for Gemma's.
    """
    for linear in linears:
        linear.get_parameter("weight").mul_(s)
    gain = norm.get_parameter("weight")
    gain.copy_((gain + norm_offset) / s - norm_offset)


def _error(weight: Tensor, s: Tensor, gram: Tensor, quantizer: WeightQuantizer) -> float:
    scaled = weight * s
    scale = spread(searched_scale(scaled, gram.diagonal() / s.square(), quantizer, COARSE_MULTIPLIERS), len(s))
    difference = scale * nearest_codes(scaled, scale, quantizer) / s - weight
    return float(((difference @ gram) * difference).sum())
