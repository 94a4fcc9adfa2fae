"""Where latent weights lie relative to the ternary thresholds (BitDistill figure 2), one tensor in memory at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from bitdistill_core.quantize.weight import (
    TWN_THRESHOLD,
    WeightQuantizer,
    over_groups,
    quantize_weight,
    spread,
    weight_scale,
)

RANGE = 3.0  # the histogram covers weight / absmean from -RANGE to RANGE
NUM_BINS = 120  # so that the thresholds +-0.5 are bin edges
NEAR = 0.05  # "near a threshold", in units of the absmean


@dataclass(frozen=True)
class WeightSummary:
    """The latent weights of every BitLinear of a checkpoint, divided by the absmean of those that share a scale.

    Binary weights are those minus their mean first.
    """

    num_weights: int
    density: list[float]  # NUM_BINS values; the area below the curve is the share inside the range
    code_shares: tuple[float, float, float]  # of -1, 0, 1
    near_share: float  # within NEAR of a threshold
    threshold: float  # codes change at plus and minus this


def summarize(weights: Path, modules: Sequence[str], quantizer: WeightQuantizer) -> WeightSummary:
    """The summary of `modules`' weights in a safetensors file, as `quantizer` makes codes of them.

    Raises:
        ValueError: an unreadable file or one that lacks a module's weight.
    """
    histogram = torch.zeros(NUM_BINS, dtype=torch.float64)
    codes = torch.zeros(3, dtype=torch.float64)
    num_weights, num_near = 0, 0
    is_binary = quantizer.grid == "binary"
    threshold = 0.0 if is_binary else 0.5 if quantizer.scale_rule == "absmean" else TWN_THRESHOLD
    try:
        with safe_open(weights, framework="pt") as file:
            missing = [module for module in modules if f"{module}.weight" not in set(file.keys())]
            if missing or not modules:
                raise ValueError(
                    "the weight histogram needs the weight of every BitLinear; got "
                    f"missing={', '.join(missing) or 'all'} in path={weights}; run that stage again"
                )
            for module in modules:
                weight = file.get_tensor(f"{module}.weight").float()
                found, _ = quantize_weight(weight, quantizer)
                width = weight.shape[1]
                absmean = spread(weight_scale(weight, quantizer), width)
                if is_binary:
                    weight -= spread(over_groups(weight, quantizer, torch.mean), width)
                relative = weight.div_(absmean)
                histogram += torch.histc(relative, NUM_BINS, -RANGE, RANGE).double()
                codes += torch.bincount(found.flatten().to(torch.int64) + 1, minlength=3).double()
                num_near += int(((relative.abs() - threshold).abs() <= NEAR).sum())
                num_weights += relative.numel()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"unreadable weights path={weights}: {error}; run that stage again") from None
    shares = [float(share) for share in codes / num_weights]
    density = histogram / (num_weights * 2 * RANGE / NUM_BINS)
    near_share = num_near / num_weights
    return WeightSummary(num_weights, density.tolist(), (shares[0], shares[1], shares[2]), near_share, threshold)
