"""How many tokens to draft: as many as raise the expected tokens per second, by what steps and guesses have shown.

A step of B continuations with d drafts of which i survive with probability P_i brings B + sum P_i tokens in t(B + d)
seconds. t is measured for each number of rows; P_i is the product of the shares of drafts that held at each place,
estimated for each continuation and drawn towards the share of all. The length is the one with the greatest ratio.

Both estimates may be wrong, and the machine may change. So what drafting has cost beyond plain steps is added up, and
when it exceeds ALLOWED of all time, plain steps follow until it does not: the loss stays bounded by what is allowed,
whatever the estimates. Estimates that say no fade, so that drafting is tried again now and then.
"""

from __future__ import annotations

import statistics
from collections import deque

ALLOWED = 0.01  # share of all time
REFRESH = 32  # every so many steps one is plain, to measure what that costs now
_PRIOR_SHARE, _PRIOR_WEIGHT = 0.6, 2.0
_MEMORY = 0.98  # what an observation still weighs after the next one
_SLOPE = 0.03  # assumed cost of a further row that was never measured, of a step of one


class Shares:
    """Share of drafts that held at each place, given that those before it did; recent ones weigh more."""

    def __init__(self, most: int, prior: Shares | None = None) -> None:
        self._tried, self._held, self._prior = [0.0] * most, [0.0] * most, prior

    def __getitem__(self, place: int) -> float:
        prior = self._prior[place] if self._prior else _PRIOR_SHARE
        return (self._held[place] + _PRIOR_WEIGHT * prior) / (self._tried[place] + _PRIOR_WEIGHT)

    def observe(self, proposed: int, accepted: int) -> None:
        self.fade()
        for place in range(min(proposed, accepted + 1)):
            self._tried[place] += 1
            self._held[place] += place < accepted

    def fade(self) -> None:
        self._tried = [_MEMORY * x for x in self._tried]
        self._held = [_MEMORY * x for x in self._held]


class StepTimes:
    """Seconds of a step by its number of rows: the median of the latest few of each number, linear in between."""

    def __init__(self) -> None:
        self._seen: dict[int, deque[float]] = {}

    def add(self, rows: int, seconds: float) -> None:
        self._seen.setdefault(rows, deque(maxlen=9)).append(seconds)

    def count(self, rows: int) -> int:
        return len(self._seen.get(rows, ()))

    def __getitem__(self, rows: int) -> float:
        """Needs at least one measured number of rows."""
        if rows in self._seen:
            return statistics.median(self._seen[rows])
        below = max((r for r in self._seen if r < rows), default=None)
        above = min((r for r in self._seen if r > rows), default=None)
        if below is None:
            return statistics.median(self._seen[min(self._seen)])
        low = statistics.median(self._seen[below])
        if above is None:
            return low * (1 + _SLOPE * (rows - below))
        return low + (statistics.median(self._seen[above]) - low) * (rows - below) / (above - below)


class ProposalTimes:
    """Seconds that so many drafts take to make: the median of the latest few of each number, linear in between and from
    none on. Of a draft model they grow with the number, of heads they hardly do."""

    def __init__(self) -> None:
        self._seen: dict[int, deque[float]] = {}

    def add(self, count: int, seconds: float) -> None:
        self._seen.setdefault(count, deque(maxlen=9)).append(seconds)

    def __getitem__(self, count: int) -> float:
        below = max((c for c in self._seen if c <= count), default=0)
        above = min((c for c in self._seen if c > count), default=None)
        low = statistics.median(self._seen[below]) if below else 0.0
        if below == count:
            return low
        if above is None:
            return low * count / below if below else 0.0
        return low + (statistics.median(self._seen[above]) - low) * (count - below) / (above - below)


class DraftLength:
    """For all continuations of an engine.

    A step is: :meth:`choose` for each continuation that generates, :meth:`observe` for each that had drafts, and
    :meth:`measured`.

    Args:
        most: drafts of one continuation in a step.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.shares = Shares(most)
        self._times = StepTimes()
        self._base = 0  # continuations of the last step
        self._steps = 0
        self._proposals = ProposalTimes()
        self._time = self._lost = 0.0
        self._begin()

    def _begin(self) -> None:
        self._asked = self._drafted = self._accepted = 0
        self._expected = 0.0
        self._proposing = 0.0

    def choose(self, shares: Shares, limit: int) -> int:
        """How many drafts the next continuation of this step should have."""
        self._asked += 1
        base = max(self._base, self._asked)
        plain = self._steps % REFRESH == 0 or self._times.count(base) < 3
        if plain or self._lost > ALLOWED * self._time + self._times[base]:
            return 0
        best, best_rate, survives, gain = 0, 0.0, 1.0, 0.0
        for count in range(min(limit, self.most) + 1):
            seconds = self._times[base + self._drafted + count] + self._proposing + self._proposals[count]
            rate = (base + self._expected + gain) / seconds
            if rate > best_rate:
                best, best_rate = count, rate
            if count < self.most:
                survives *= shares[count]
                gain += survives
        if best == 0:
            shares.fade()
            self.shares.fade()
        return best

    def proposed(self, shares: Shares, count: int, seconds: float, *, first: bool = False) -> None:
        """So many drafts came, after so long; ``first``: of a text, which may have taken reading all of it."""
        self._drafted += count
        self._proposing += seconds
        if count and not first:
            self._proposals.add(count, seconds)
        survives = 1.0
        for place in range(count):
            survives *= shares[place]
            self._expected += survives

    def observe(self, shares: Shares, proposed: int, accepted: int) -> None:
        shares.observe(proposed, accepted)
        self.shares.observe(proposed, accepted)
        self._accepted += accepted

    def measured(self, rows: int, seconds: float) -> None:
        """The step is done; ``rows`` are all it computed, ``seconds`` all it took, proposals included."""
        base = self._asked
        if base and rows == base + self._drafted:  # without prompts, whose rows cost otherwise
            self._times.add(rows, seconds - self._proposing)
            self._time += seconds
            if self._times.count(base):
                plain = self._times[base]
                self._lost += seconds - plain * (base + self._accepted) / base if self._drafted else self._proposing
                self._lost = max(self._lost, -10 * plain)
        self._base = base
        self._steps += base > 0
        self._begin()
