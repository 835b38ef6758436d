"""The warm-up, stable, decay schedule in closed form."""

from __future__ import annotations

import math

import pytest

from fastsft.config import ScheduleOptions
from fastsft.train.schedule import factor


def rates(total: int, *, warmup: float, decay: float, final: float = 0.0) -> list[float]:
    options = ScheduleOptions(kind="wsd", warmup=warmup, decay=decay, final=final)
    return [factor(options, step, total) for step in range(total)]


@pytest.mark.parametrize(("decay", "down"), [(0.2, 10), (7, 7), (0.99, 46), (80, 46), (0, 0), (1, 1)])
def test_closed_form(decay: float, down: int) -> None:
    total, warm = 50, 4
    found = rates(total, warmup=4, decay=decay, final=0.1)
    assert found[:warm] == [0.25, 0.5, 0.75, 1.0]
    assert all(f == 1 for f in found[warm : total - down])
    for i, got in enumerate(found[total - down :], 1):
        assert got == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(i / down)), abs=1e-12)
    if down:
        assert found[-1] == pytest.approx(0.1)


def test_a_longer_run_begins_alike() -> None:
    """What the schedule is for: the constant part goes on, and the decay is run from any point of it."""
    short, long = rates(40, warmup=5, decay=10), rates(90, warmup=5, decay=10)
    assert short[:30] == long[:30]
    assert short[30:] == long[80:]


def test_short_runs() -> None:
    assert rates(1, warmup=0, decay=0.1) == [0]
    assert rates(1, warmup=0, decay=0) == [1]
    assert rates(3, warmup=9, decay=0.5) == pytest.approx([1 / 3, 2 / 3, 1])
