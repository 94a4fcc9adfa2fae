"""AWQ (Lin et al., arXiv 2306.00978): input channels scaled by their activations before the weight is quantised.

BitDistill's Table 4 names a variant AWQ, but the authors' code for it multiplies the scale of some rows by 0.7 and of
the others by 1.2, without calibration data. This is the real one: it leaves the float function as it is.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from bitdistill_core.quantize.weight import WeightQuantizer, fake_quantize_weight

NUM_ALPHAS = 20


@torch.no_grad()
def channel_scale(
    weights: Sequence[Tensor], gram: Tensor, mean_magnitude: Tensor, quantizer: WeightQuantizer
) -> Tensor:
    """AWQ's scale of each input channel, s (K,) fp32: weights take W diag(s), their common input takes 1 / s.

    s_c = mean|x_c|^alpha / sqrt(max * min of these), Eq. 5 of arXiv 2306.00978 and the normalisation of its code. Of
    alpha = 0, 0.05, ... 0.95 the one with the least error ||X W^T - (X / s) Q(W diag(s))^T||^2, summed over weights.
    alpha = 0 is no scaling. A channel below 1e-4 of the largest, such as a dead one, counts as that.

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
def fold(s: Tensor, linears: Iterable[nn.Module], norm: nn.Module, *, norm_offset: float) -> None:
    """Multiplies the input channels of each linear's weight (N, K) by s (K,) and divides the gain of `norm` by it.

    `linears` must be all that read the norm's output. The norm multiplies by norm_offset + weight, 1 for Gemma's.
    """
    for linear in linears:
        linear.get_parameter("weight").mul_(s)
    gain = norm.get_parameter("weight")
    gain.copy_((gain + norm_offset) / s - norm_offset)


def _error(weight: Tensor, s: Tensor, gram: Tensor, quantizer: WeightQuantizer) -> float:
    difference = fake_quantize_weight(weight * s, quantizer) / s - weight
    return float(((difference @ gram) * difference).sum())
