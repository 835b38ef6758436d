"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from fastsft.config import ScheduleOptions


def warmup_steps(options: ScheduleOptions, total: int) -> int:
    """``warmup`` below 1 is a fraction of all steps (rounded up), otherwise a number of steps."""
    return _steps(options.warmup, total)


def factor(options: ScheduleOptions, step: int, total: int) -> float:
    """Fraction of the peak learning rate at ``step`` in [0, total).

    Linear from 1/w to 1 over the w warm-up steps; then constant, or with x from 0 to 1 over all that is left down to
    ``final``, which the last step reaches: linearly, or by half a cosine. ``wsd`` is constant before its ``decay``, so
    that a run can be prolonged from there (arXiv 2404.06395), and goes down by 1 - sqrt(x) (arXiv 2405.18392).
    """
    warm = warmup_steps(options, total)
    if step < warm:
        return (step + 1) / warm
    down = {"constant": 0, "wsd": _steps(options.decay, total)}.get(options.kind, total)
    down = min(down, total - warm)
    if step < total - down:
        return 1.0
    x = (step + 1 - (total - down)) / down
    shape = {"linear": 1 - x, "cosine": 0.5 * (1 + math.cos(math.pi * x)), "wsd": 1 - math.sqrt(x)}[options.kind]
    return options.final + (1 - options.final) * shape


def _steps(given: float, total: int) -> int:
    return min(math.ceil(given * total) if given < 1 else int(given), total)
