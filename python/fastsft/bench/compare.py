"""Two results side by side: what became faster, what slower, and what cannot be told apart."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any, Literal

from fastsft.bench.results import Result, Row

Verdict = Literal["faster", "slower", "equal"]


@dataclass(frozen=True)
class Change:
    """``times``: how many times longer the second run took. ``rivals``: the same of the rivals of the group, by their
    median; where they moved as much, the machine did."""

    group: str
    contestant: str
    before: Row
    after: Row
    times: float
    verdict: Verdict
    rivals: float | None


def changes(before: Result, after: Result, threshold: float) -> list[Change]:
    """Of every contestant of ours that both have. A change counts if the medians differ by more than ``threshold``, a
    share of the first, and the ranges in which the middle 60 % of the rounds lie (or half of them, where rows are
    older) do not overlap.

    Raises:
        ValueError: a threshold below 0, or no group in common.
    """
    if not threshold >= 0:
        raise ValueError(f"--threshold: expected a share of the time, at least 0, got {threshold}")
    old, new = (
        {group: {row.contestant: row for row in rows} for group, rows in result.groups().items()}
        for result in (before, after)
    )
    found = []
    for group, mine in new.items():
        then = old.get(group, {})
        both = [(then[name], row) for name, row in mine.items() if name in then]
        drift = [b.median / a.median for a, b in both if not b.is_ours]
        rivals = statistics.median(drift) if drift else None
        found += [
            Change(group, b.contestant, a, b, b.median / a.median, verdict(a, b, threshold), rivals)
            for a, b in both
            if b.is_ours
        ]
    if not found:
        raise ValueError("the two results have no group in common")
    return found


def verdict(before: Row, after: Row, threshold: float) -> Verdict:
    """Another time only if the medians are further apart than ``threshold`` and the spreads do not meet."""
    (low, high), (new_low, new_high) = before.spread, after.spread
    if after.median > before.median * (1 + threshold) and new_low > high:
        return "slower"
    if after.median < before.median / (1 + threshold) and new_high < low:
        return "faster"
    return "equal"


def differences(before: Result, after: Result) -> list[str]:
    """What of the machines and versions is not the same: times cannot be compared across those."""
    return [
        f"{name}: {old} before, {new} after"
        for name, old, new in _pairs(before.machine, after.machine)
        if old != new and name != "versions.fastsft"
    ]


def _pairs(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []
    for key in {**before, **after}:
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _pairs(old, new, f"{prefix}{key}.")
        else:
            found.append((prefix + key, old, new))
    return found
