"""How many tokens to draft: as many as raise the expected tokens per second, by what steps and guesses have shown.

A step of B continuations with d drafts of which i survive with probability P_i brings B + sum P_i tokens in t(B + d)
seconds. t is measured for each number of rows; P_i is the product of the shares of drafts that held at each place,
estimated for each continuation and drawn towards the share of all. The length is the one with the greatest ratio.

Both estimates may be wrong, and the machine may change. So what drafting has cost beyond plain steps is added up, and
when it exceeds ALLOWED of all time, plain steps follow until it does not: the loss stays bounded by what is allowed,
whatever the estimates. Estimates that say no fade, so that drafting is tried again now and then.

A branch that has another guess in place of draft i takes i + 1 rows, as its path begins with the last token and the
drafts before it. It brings one token with probability P_{i-1} (1 - p_i) q_i, where p_i is the share of drafts that hold
at that place, and q_i that of other guesses where the draft does not. The first places have branches, as many as raise
the ratio the most.
"""

from __future__ import annotations

import bisect
import statistics
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping

ALLOWED = 0.01  # share of all time
REFRESH = 32  # every so many steps one is plain, to measure what that costs now
_PRIOR_SHARE, _PRIOR_WEIGHT = 0.6, 2.0
_PRIOR_OTHER = 0.25  # of guesses in place of one that did not hold
_MEMORY = 0.98  # what an observation still weighs after the next one
_SLOPE = 0.03  # assumed cost of a further row, of a step, while steps of one number alone were measured


class Shares:
    """Share of drafts that held at each place, given that those before it did; recent ones weigh more.

    Args:
        prior: shares of all texts, or one for all places.
    """

    def __init__(self, most: int, prior: Shares | float = _PRIOR_SHARE) -> None:
        self._tried, self._held, self._prior = [0.0] * most, [0.0] * most, prior
        self._scale = 1.0  # of all counts: what they have faded to since they last changed

    def __getitem__(self, place: int) -> float:
        prior, scale = self._prior[place] if isinstance(self._prior, Shares) else self._prior, self._scale
        return (self._held[place] * scale + _PRIOR_WEIGHT * prior) / (self._tried[place] * scale + _PRIOR_WEIGHT)

    def observe(self, proposed: int, accepted: int) -> None:
        self.count({place: place < accepted for place in range(min(proposed, accepted + 1))})

    def count(self, seen: Mapping[int, bool]) -> None:
        """Whether what was tried at each of these places held."""
        self.fade()
        self._tried = [self._scale * x for x in self._tried]
        self._held = [self._scale * x for x in self._held]
        self._scale = 1.0
        for place, held in seen.items():
            self._tried[place] += 1
            self._held[place] += held

    def fade(self) -> None:
        self._scale *= _MEMORY


class Times(ABC):
    """Seconds by a number: the median of the latest few of each number, linear in between."""

    def __init__(self) -> None:
        self._seen: dict[int, deque[float]] = {}
        self._numbers: list[int] = []  # in order
        self._medians: dict[int, float] = {}
        self._known: dict[int, float] = {}  # what has been asked for since the last measurement

    def add(self, number: int, seconds: float) -> None:
        if number not in self._seen:
            self._seen[number] = deque(maxlen=9)
            bisect.insort(self._numbers, number)
        self._seen[number].append(seconds)
        self._medians[number] = statistics.median(self._seen[number])
        self._known = {}

    def count(self, number: int) -> int:
        return len(self._seen.get(number, ()))

    def __getitem__(self, number: int) -> float:
        if number not in self._known:
            self._known[number] = self._estimate(number)
        return self._known[number]

    def _estimate(self, number: int) -> float:
        at = bisect.bisect_left(self._numbers, number)
        if number in self._medians:
            return self._medians[number]
        if at == len(self._numbers):
            return self._beyond(number)
        above = self._numbers[at]
        if at == 0:
            return self._medians[above]
        below = self._numbers[at - 1]
        low, high = self._medians[below], self._medians[above]
        return low + (high - low) * (number - below) / (above - below)

    @abstractmethod
    def _beyond(self, number: int) -> float:
        """For more than was ever measured."""


class StepTimes(Times):
    """Of a step, by its number of rows. Needs at least one measured number; beyond the greatest, each further row is
    taken to cost what those before did."""

    def _beyond(self, number: int) -> float:
        least, most = self._numbers[0], self._numbers[-1]
        low, high = self._medians[least], self._medians[most]
        slope = _SLOPE * high if least == most else max(0.0, high - low) / (most - least)
        return high + slope * (number - most)


class ProposalTimes(Times):
    """Of making so many guesses, of which none take none. Of a draft model's drafts they grow with the number, of
    heads' they hardly do."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers, self._medians = [0], {0: 0.0}

    def _beyond(self, number: int) -> float:
        most = self._numbers[-1]
        return self._medians[most] * number / most if most else 0.0


class DraftLength:
    """For all continuations of an engine.

    A step is: :meth:`begin`; if it says so, :meth:`choose` and :meth:`chose` for each continuation that generates, and
    :meth:`proposed` where that is not 0, which :meth:`branches` and :meth:`branched` may follow; :meth:`observe` for
    each that had drafts; :meth:`measured`, unless it failed.

    Args:
        most: drafts of one continuation in a step.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.shares, self.others = Shares(most), Shares(most, _PRIOR_OTHER)
        self._times = StepTimes()
        self._steps = 0
        self._proposals, self._branchings = ProposalTimes(), ProposalTimes()
        self._time = self._lost = 0.0
        self.begin(0)

    def begin(self, base: int) -> bool:
        """Whether to draft at all in a step in which ``base`` continuations generate."""
        self._base = base
        self._rows = self._computed = self._accepted = 0
        self._expected = self._proposing = self._choosing = 0.0
        self._least: float | None = None
        if self._steps % REFRESH == 0 or self._times.count(base) < 3:
            return False
        return self._lost <= ALLOWED * self._time + self._times[base]

    def choose(self, shares: Shares, limit: int) -> int:
        """How many drafts the next continuation of this step should have."""
        best, best_rate, survives, gain = 0, 0.0, 1.0, 0.0
        if shares[0] > self._least_share():
            for count in range(min(limit, self.most) + 1):
                rate = (self._base + self._expected + gain) / self._seconds(count)
                if rate > best_rate:
                    best, best_rate = count, rate
                if count < self.most:
                    survives *= shares[count]
                    gain += survives
        if best == 0:
            shares.fade()
            self.shares.fade()
        return best

    def _seconds(self, count: int) -> float:
        """Of the step, if the next continuation has so many drafts and those after it have none."""
        return self._times[self._base + self._rows + count] + self._proposing + self._proposals[count]

    def _least_share(self) -> float:
        """Of first drafts that must hold for any number of them to pay: not more than this do not, even if what comes
        after one that holds always holds. Found once for all continuations up to the next one that drafts."""
        if self._least is None:
            tokens, plain = self._base + self._expected, self._seconds(0)
            self._least = min(tokens * (self._seconds(n) / plain - 1) / n for n in range(1, self.most + 1))
        return self._least

    def chose(self, seconds: float) -> None:
        """So long a choice took."""
        self._choosing += seconds

    def proposed(self, shares: Shares, count: int, seconds: float, *, first: bool = False) -> None:
        """So many drafts came, after so long; ``first``: of a text, which may have taken reading all of it."""
        self._rows += count
        self._proposing += seconds
        self._least = None
        if count and not first:
            self._proposals.add(count, seconds)
        survives = 1.0
        for place in range(count):
            survives *= shares[place]
            self._expected += survives

    def branches(self, shares: Shares, others: Shares, most: int) -> int:
        """How many of the first ``most`` places of the drafts just proposed should have another guess."""
        rows, tokens = self._base + self._rows, self._base + self._expected
        best, best_rate = 0, tokens / (self._times[rows] + self._proposing)
        for count, gain in enumerate(_gains(shares, others, most), 1):
            rows, tokens = rows + count + 1, tokens + gain
            rate = tokens / (self._times[rows] + self._proposing + self._branchings[count])
            if rate > best_rate:
                best, best_rate = count, rate
        if best == 0:
            others.fade()
            self.others.fade()
        return best

    def branched(self, shares: Shares, others: Shares, count: int, seconds: float, *, first: bool = False) -> None:
        """So many came, after so long; ``first``: of a text."""
        self._proposing += seconds
        if count and not first:
            self._branchings.add(count, seconds)
        self._expected += sum(_gains(shares, others, count))
        self._rows += sum(place + 2 for place in range(count))
        self._least = None

    def observe(self, shares: Shares, proposed: int, accepted: int, rows: int) -> None:
        """``rows`` of the step were those of its drafts: fewer than were planned where blocks lacked."""
        self._computed += rows
        shares.observe(proposed, accepted)
        self.shares.observe(proposed, accepted)
        self._accepted += accepted

    def observe_other(self, others: Shares, place: int, held: bool) -> None:
        """Whether the guess in place of the one that did not hold did."""
        others.count({place: held})
        self.others.count({place: held})
        self._accepted += held

    def measured(self, rows: int, seconds: float) -> None:
        """The step is done; ``rows`` are all it computed, ``seconds`` all it took, choices and proposals included."""
        base, speculating = self._base, self._choosing + self._proposing
        if base and rows == base + self._computed:  # without prompts, whose rows cost otherwise
            self._times.add(rows, seconds - speculating)
            self._time += seconds
            if self._times.count(base):
                plain = self._times[base]
                self._lost += seconds - plain * (base + self._accepted) / base if self._computed else speculating
                self._lost = max(self._lost, -10 * plain)
        self._steps += base > 0


def _gains(shares: Shares, others: Shares, count: int) -> list[float]:
    """Tokens that another guess at each of the first places brings."""
    gains, survives = [], 1.0
    for place in range(count):
        gains.append(survives * (1 - shares[place]) * others[place])
        survives *= shares[place]
    return gains
