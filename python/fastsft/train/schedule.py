"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Literal

from fastsft.config import ScheduleOptions


def warmup_steps(options: ScheduleOptions, total: int) -> int:
    """``warmup`` below 1 is a fraction of all steps (rounded up), otherwise a number of steps."""
    return _steps(options.warmup, total)


def warmup_stable_decay(
    step: int, total: int, *, warmup: float, decay: float, final: float = 0.0, shape: Literal["sqrt", "linear"] = "sqrt"
) -> float:
    """Fraction of the peak learning rate at ``step`` in [0, total): a schedule whose constant part can be prolonged
    (WSD, arXiv 2404.06395; the shapes of its decay, arXiv 2405.18392).

    Linear from 1/w to 1 over the w warm-up steps, constant, and down to ``final``, which the last step reaches: with x
    from 0 to 1 over the decay, by 1 - sqrt(x) or 1 - x.

    Args:
        warmup, decay: below 1 a fraction of all steps (rounded up), otherwise a number of steps; the decay gets what
            the warm-up leaves.
    """
    warm = _steps(warmup, total)
    down = min(_steps(decay, total), total - warm)
    if step < warm:
        return (step + 1) / warm
    done = step - (total - down) + 1
    if done <= 0:
        return 1.0
    x = done / down
    return final + (1 - final) * (1 - (math.sqrt(x) if shape == "sqrt" else x))


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


def _steps(given: float, total: int) -> int:
    return min(math.ceil(given * total) if given < 1 else int(given), total)
