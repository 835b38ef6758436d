"""What a run's losses and gradient norms give away while it runs: spikes, and how it began."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_WINDOW, _LEAST = 100, 20
_SIGMAS = 6.0
_FLOOR = 0.01
"""Of the median: a smaller spread is taken for this much, so that a loss which hardly moves gives no alarm."""
_EARLY = 100


@dataclass(frozen=True)
class Spike:
    """A value more than six robust standard deviations above the running centre. ``name``: loss or grad_norm."""

    name: str
    value: float
    centre: float
    sigma: float
    samples: tuple[str, ...]
    """Where the rows of the step stand."""

    def describe(self) -> str:
        shown = ", ".join(self.samples[:5]) + (f" and {len(self.samples) - 5} more" if len(self.samples) > 5 else "")
        return (
            f"{'loss' if self.name == 'loss' else 'gradient norm'} {self.value:.3g} is a spike: "
            f"{(self.value - self.centre) / self.sigma:.0f} sigma above {self.centre:.3g}. Samples: {shown}"
        )


@dataclass(frozen=True)
class Early:
    """Means over the first steps, 5 % of the run and at most 100. Among runs on the same data, low gradient norms with
    higher losses early foretell the better model (arXiv 2412.13337), so that the others can be stopped."""

    steps: int
    loss: float
    grad_norm: float


class Watch:
    """Sees every step of a run once.

    Centre and spread are the median and 1.4826 times the median absolute deviation of the last 100 steps, which single
    outliers do not move; the first 20 steps are never spikes.

    Args:
        rows: of metrics.jsonl, the steps that the run made before it was interrupted.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self._recent = {name: deque[float](maxlen=_WINDOW) for name in ("loss", "grad_norm")}
        self._first: list[tuple[float, float]] = []
        for row in rows:
            if row["kind"] == "step":
                self._take(row["loss"], row["grad_norm"])

    def see(self, loss: float, grad_norm: float, samples: Sequence[str]) -> list[Spike]:
        """The spikes of a step."""
        found = []
        for name, value in (("loss", loss), ("grad_norm", grad_norm)):
            recent = self._recent[name]
            if len(recent) < _LEAST:
                continue
            centre = statistics.median(recent)
            spread = 1.4826 * statistics.median(abs(v - centre) for v in recent)
            sigma = max(spread, _FLOOR * abs(centre), 1e-12)
            if value > centre + _SIGMAS * sigma:
                found.append(Spike(name, value, centre, sigma, tuple(samples)))
        self._take(loss, grad_norm)
        return found

    def early(self, total_steps: int) -> Early | None:
        """None of a run that has not made these steps."""
        steps = early_steps(total_steps)
        if len(self._first) < steps:
            return None
        first = self._first[:steps]
        return Early(steps, statistics.fmean(f[0] for f in first), statistics.fmean(f[1] for f in first))

    def _take(self, loss: float, grad_norm: float) -> None:
        self._recent["loss"].append(loss)
        self._recent["grad_norm"].append(grad_norm)
        if len(self._first) < _EARLY:
            self._first.append((loss, grad_norm))


def early_steps(total_steps: int) -> int:
    """A twentieth of a run, at most ``_EARLY`` of its steps."""
    return min(_EARLY, max(1, math.ceil(0.05 * total_steps)))
