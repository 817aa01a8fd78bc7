"""Learning-rate schedules as factors of the peak learning rate."""

from __future__ import annotations

import math

from moe_train.training.options import ScheduleOptions


def lr_factor(step: int, steps: int, options: ScheduleOptions) -> float:
    """Factor for optimizer step ``step`` (0 for the first) of ``steps``.

    Warm-up is linear and its first step is 1 / warmup_steps, not 0. ``wsd`` stays at the peak and decays as a cosine
    over the last ``decay_fraction`` of the steps; ``cosine`` decays from the end of the warm-up. The last step has
    ``final_lr_fraction``.
    """
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    if options.kind == "constant":
        return 1.0
    if options.kind == "cosine":
        start = options.warmup_steps
    else:
        start = max(options.warmup_steps, steps - round(options.decay_fraction * steps))
    if step < start:
        return 1.0
    progress = (step - start + 1) / max(1, steps - start)
    floor = options.final_lr_fraction
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
