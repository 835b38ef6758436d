"""How many tokens to draft, and where to have other guesses: against simulated machines."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsft.engine.draft.length import DraftLength, Shares


def simulate(
    cost: Callable[[int], float],
    share: Callable[[int], float],
    steps: int = 4000,
    *,
    most: int = 8,
    proposal: Callable[[int], float] = lambda count: 0.0,
    choosing: float = 0.0,
    paths: int = 1,
    other: Callable[[int], float] = lambda step: 0.0,
    branching: Callable[[int], float] = lambda count: 0.0,
    batch: int = 1,
) -> tuple[float, float, float]:
    """(time for each token over that of plain steps, mean drafts of a continuation and step, mean further paths of one
    with drafts); ``other``: the share of other guesses that hold where the draft does not."""
    rng = random.Random(1)
    length = DraftLength(most)
    each = [(Shares(most, length.shares), Shares(most, length.others)) for _ in range(batch)]
    time = plain = 0.0
    tokens = drafts = forks = speculating = 0
    for step in range(steps):
        drafting = length.begin(batch)
        rows, making, advanced = batch, 0.0, batch
        proposed = []
        for shares, others in each:
            count = length.choose(shares, most) if drafting else 0
            deciding = choosing if drafting else 0.0
            length.chose(deciding)
            making += deciding
            if not count:
                continue
            length.proposed(shares, count, proposal(count))
            branches = length.branches(shares, others, min(paths - 1, count))
            apart = branching(branches)
            length.branched(shares, others, branches, apart)
            making += proposal(count) + apart
            mine = count + sum(2 + place for place in range(branches))
            proposed.append((shares, others, count, branches, mine))
            rows += mine
        for shares, others, count, branches, mine in proposed:
            accepted = 0
            while accepted < count and rng.random() < share(step):
                accepted += 1
            length.observe(shares, count, accepted, mine)
            if accepted < branches:
                held = rng.random() < other(step)
                length.observe_other(others, accepted, held)
                accepted += held
            advanced += accepted
            drafts += count
            forks += branches
        seconds = cost(rows) * rng.lognormvariate(0, 0.03) + making
        length.measured(rows, seconds)
        time += seconds
        tokens += advanced
        speculating += len(proposed)
        plain = tokens * cost(batch) / batch
    return time / plain, drafts / steps / batch, forks / max(speculating, 1)


@pytest.mark.parametrize("paths", [1, 4])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.6])
@pytest.mark.parametrize("slope", [0.0, 0.02, 0.3, 1.0])
def test_never_slower_than_plain_steps_by_two_percent(slope: float, share: float, paths: int) -> None:
    ratio, _, _ = simulate(lambda rows: 1 + slope * (rows - 1), lambda step: share, paths=paths)
    assert ratio <= 1.02


def test_other_guesses_are_made_where_they_pay() -> None:
    shares: dict[str, Any] = {
        "share": lambda step: 0.6,
        "most": 4,
        "proposal": lambda count: 0.2,
        "other": lambda step: 0.4,
    }
    single, _, _ = simulate(lambda rows: 1 + 0.002 * rows, **shares)
    tree, _, forks = simulate(lambda rows: 1 + 0.002 * rows, paths=4, **shares)
    assert tree < 0.95 * single
    assert forks > 2
    single, _, _ = simulate(lambda rows: 1 + 0.15 * rows, **shares)
    tree, _, forks = simulate(lambda rows: 1 + 0.15 * rows, paths=4, **shares)
    assert tree < 1.01 * single
    assert forks < 0.1
    _, _, forks = simulate(lambda rows: 1 + 0.03 * rows, **(shares | {"paths": 4, "other": lambda step: 0.02}))
    assert forks < 0.3
    late: dict[str, Any] = shares | {"paths": 4, "other": lambda step: 0.0 if step < 1000 else 0.9}
    _, _, forks = simulate(lambda rows: 1 + 0.02 * rows, **late)
    assert forks > 0.5


def test_never_slower_where_other_guesses_take_long_now_and_then() -> None:
    """The median tells nothing of it: what was lost does."""
    calls = itertools.count(1)
    ratio, _, forks = simulate(
        lambda rows: 1 + 0.001 * rows, lambda step: 0.3, most=4, paths=4, other=lambda step: 0.3, batch=4,
        branching=lambda branches: 5.0 if branches and next(calls) % 5 == 0 else 0.0,
    )  # fmt: skip
    assert ratio <= 1.02
    assert forks > 1


def test_what_other_guesses_cost_counts() -> None:
    shares: dict[str, Any] = {"share": lambda step: 0.6, "most": 4, "other": lambda step: 0.4, "paths": 4}
    single, _, _ = simulate(lambda rows: 1.0, **(shares | {"paths": 1}))
    tree, _, forks = simulate(lambda rows: 1.0, branching=lambda n: 0.8 if n else 0.0, **shares)
    assert tree < 1.02 * single
    assert forks < 0.2
    _, _, forks = simulate(lambda rows: 1.0, branching=lambda n: 0.05 if n else 0.0, **shares)
    assert forks > 2.5


def test_branches_that_pay_together_are_made() -> None:
    """Where the first one costs a jump and the others nothing: as of steps that are padded to a power of two."""
    length = DraftLength(4)
    shares, others = Shares(4, length.shares), Shares(4, length.others)
    for rows in range(1, 33):
        length.begin(rows)
        length.measured(rows, 1.0 if rows <= 5 else 1.06)
    length.begin(1)
    length.proposed(shares, 4, 0.0)
    one, two, three = (length.branches(shares, others, most) for most in (1, 2, 3))
    assert (one, two, three) == (0, 2, 3)


def test_never_slower_where_a_second_row_costs_a_jump() -> None:
    ratio, _, _ = simulate(lambda rows: 1.0 if rows == 1 else 2.5, lambda step: 0.5)
    assert ratio <= 1.02


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("choosing", [0.02, 0.08, 0.5])
def test_never_slower_where_choosing_to_draft_nothing_takes_time(choosing: float, share: float) -> None:
    ratio, _, _ = simulate(lambda rows: rows, lambda step: share, choosing=choosing)
    assert ratio <= 1.02


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0.5, 20), min_size=4, max_size=20), st.lists(st.booleans(), max_size=12), st.integers(1, 5))
def test_the_choice_has_the_greatest_rate(seconds: list[float], held: list[bool], limit: int) -> None:
    """Also where it is found without looking at every number."""
    most, base = 5, 3
    length = DraftLength(most)
    for rows, each in enumerate(seconds, base):
        length._times.add(rows, each)
    length._steps = 1
    length.begin(base)
    texts = [Shares(most, length.shares) for _ in range(base)]
    for right in held:
        texts[0].observe(2, 2 * right)
    drafted, expected = 0, 0.0
    for shares in texts:
        rates, gain, survives = [], 0.0, 1.0
        for count in range(min(limit, most) + 1):
            rates.append((base + expected + gain) / length._times[base + drafted + count])
            survives *= shares[min(count, most - 1)]
            gain += survives
        gains = [shares[0], shares[0] * shares[1]]
        count = length.choose(shares, limit)
        assert rates[count] == pytest.approx(max(rates))
        if count:
            before = length._expected
            length.proposed(shares, min(count, 2), 0.0)
            assert length._expected - before == pytest.approx(sum(gains[: min(count, 2)]))
            drafted, expected = drafted + min(count, 2), length._expected


def test_drafts_that_hold_are_used() -> None:
    ratio, drafts, _ = simulate(lambda rows: 1 + 0.02 * (rows - 1), lambda step: 0.95)
    assert ratio < 0.2
    assert drafts > 6
    ratio, drafts, _ = simulate(lambda rows: 1 + 0.3 * (rows - 1), lambda step: 0.7)  # the best: 1 to 2 drafts
    assert ratio < 0.9
    assert 0.8 < drafts < 3.5


def test_what_guesses_cost_counts() -> None:
    ratio, drafts, _ = simulate(lambda rows: 1 + 0.02 * rows, lambda step: 0.5, most=3, proposal=lambda count: 0.35)
    assert ratio < 0.8  # as with heads: three cost what one does, and only three pay well
    assert drafts > 2.5
    ratio, drafts, _ = simulate(lambda rows: 1 + 0.02 * rows, lambda step: 0.8, proposal=lambda count: 0.3 * count)
    assert ratio < 0.85  # as with a draft model: few pay, eight do not
    assert 0.8 < drafts < 4.5
    ratio, _, _ = simulate(lambda rows: 1 + 0.02 * rows, lambda step: 0.3, proposal=lambda count: 0.6 * count)
    assert ratio <= 1.02


def test_a_change_is_noticed() -> None:
    ratio, _, _ = simulate(lambda rows: 1 + 0.1 * (rows - 1), lambda step: 0.9 if step < 200 else 0.0)
    assert ratio <= 1.02
    ratio, _, _ = simulate(lambda rows: 1 + 0.02 * (rows - 1), lambda step: 0.0 if step < 1000 else 0.9)
    assert ratio < 0.5
