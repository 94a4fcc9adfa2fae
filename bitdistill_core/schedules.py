"""Learning-rate schedules as functions of the step."""

import math
from typing import assert_never

from bitdistill_core.choices import Schedule


def learning_rate_factor(step: int, num_steps: int, *, schedule: Schedule, warmup_ratio: float) -> float:
    """Factor on the peak learning rate at `step` (0-based) of `num_steps`, after a linear warm-up.

    `cosine` and `linear` decay to 0; `two_stage` decays linearly to 0 and is halved from the middle step on, the
    BitNet schedule of the authors' code (`mid_drop`, drop ratio 0.5).
    """
    warmup = round(num_steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(num_steps - warmup, 1)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "linear":
        return 1 - progress
    if schedule == "two_stage":
        return (1 - progress) * (0.5 if step >= num_steps // 2 else 1.0)
    if schedule == "constant":
        return 1.0
    assert_never(schedule)
