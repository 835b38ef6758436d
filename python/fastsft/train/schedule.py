"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from fastsft.config import ScheduleOptions


def warmup_steps(options: ScheduleOptions, total: int) -> int:
    """``warmup`` below 1 is a fraction of all steps (rounded up), otherwise a number of steps."""
    steps = math.ceil(options.warmup * total) if options.warmup < 1 else int(options.warmup)
    return min(steps, total)


def factor(options: ScheduleOptions, step: int, total: int) -> float:
    """Fraction of the peak learning rate at ``step`` in [0, total).

    Linear from 1/w to 1 over the w warm-up steps; then constant, or linear or half a cosine down to ``final``, which
    the last step reaches.
    """
    warm = warmup_steps(options, total)
    if step < warm:
        return (step + 1) / warm
    if options.kind == "constant":
        return 1.0
    left = total - warm
    done = (step - warm + 1) / left if left > 0 else 1.0
    shape = 1 - done if options.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return options.final + (1 - options.final) * shape
