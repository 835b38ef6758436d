"""The warm-up, stable, decay schedule in closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fastsft.train.schedule import warmup_stable_decay


@pytest.mark.parametrize("shape", ["sqrt", "linear"])
@pytest.mark.parametrize(("decay", "down"), [(0.2, 10), (7, 7), (0.99, 46), (80, 46), (0, 0), (1, 1)])
def test_closed_form(decay: float, down: int, shape: Any) -> None:
    total, warm = 50, 4
    found = [warmup_stable_decay(step, total, warmup=4, decay=decay, final=0.1, shape=shape) for step in range(total)]
    assert found[:warm] == [0.25, 0.5, 0.75, 1.0]
    assert all(f == 1 for f in found[warm : total - down])
    for i, got in enumerate(found[total - down :], 1):
        x = i / down
        assert got == pytest.approx(0.1 + 0.9 * (1 - (math.sqrt(x) if shape == "sqrt" else x)), abs=1e-12)
    if down:
        assert found[-1] == pytest.approx(0.1)


def test_a_longer_run_begins_alike() -> None:
    """What the schedule is for: the constant part goes on, and the decay is run from any point of it."""
    short = [warmup_stable_decay(s, 40, warmup=5, decay=10) for s in range(40)]
    long = [warmup_stable_decay(s, 90, warmup=5, decay=10) for s in range(90)]
    assert short[:30] == long[:30]
    assert short[30:] == long[80:]


def test_short_runs() -> None:
    assert warmup_stable_decay(0, 1, warmup=0, decay=0.1) == 0
    assert warmup_stable_decay(0, 1, warmup=0, decay=0) == 1
    assert [warmup_stable_decay(s, 3, warmup=9, decay=0.5) for s in range(3)] == pytest.approx([1 / 3, 2 / 3, 1])
