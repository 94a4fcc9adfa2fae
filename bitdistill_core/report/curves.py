"""Loss curves as numbers: smoothing for the eye, and plots/losses.csv for plotting tools."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from bitdistill_core.report.gather import Curve


def smoothed(values: Sequence[float], factor: float) -> list[float]:
    """Exponential moving average, corrected for its start: factor 0 gives the values back.

    average_i = sum_j factor^(i-j) value_j / sum_j factor^(i-j), over j <= i.
    """
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = factor * total + value, factor * weight + 1.0
        out.append(total / weight)
    return out


def write_losses(losses: Mapping[str, Mapping[str, Curve]], path: Path) -> None:
    """A CSV of every reported loss, not smoothed: stage, step, part, value. The parts are the weighted ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("stage", "step", "part", "value"))
        for stage, parts in losses.items():
            for part, curve in parts.items():
                writer.writerows((stage, step, part, value) for step, value in curve)
