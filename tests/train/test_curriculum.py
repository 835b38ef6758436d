"""Sources chosen by learning progress: shares by the formula in plain Python, samples that are gone through evenly."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from train_cases import random_samples

from fastsft.config import Config, ConfigError, load_config
from fastsft.data.batch import Sample
from fastsft.data.store import SampleStore
from fastsft.train.curriculum import CurriculumStage


def config_of(**stage: Any) -> Config:
    sources = [{"name": n, "files": ["unused"]} for n in ("a", "b", "c")]
    options = {"name": "s", "curriculum": "ucb", "curriculum_steps": 4, "max_steps": 1000, **stage}
    return load_config(
        {"data": {"sources": sources, "max_length": 24}, "train": {"tokens_per_batch": 60, "accumulation": 2},
         "stages": [options]}
    )  # fmt: skip


def store_of() -> SampleStore:
    samples = random_samples(90, 3)
    return SampleStore.from_samples([Sample(s.ids, s.weights, s.source, i % 3) for i, s in enumerate(samples)])


def run(stage: CurriculumStage, steps: range, loss: Any) -> list[tuple[int, dict[int, float], list[int]]]:
    """(round, shares, samples) of every step; ``loss(origin, round)`` is what each source's tokens have."""
    seen = []
    for step in steps:
        members = np.concatenate(stage.members(step))
        seen.append((stage.epoch(step), stage.shares(), members.tolist()))
        origins = {int(o) for o in stage._store.origins[members]}
        stage.observe(step, {o: (2.0 * loss(o, stage.epoch(step)), 2.0) for o in origins})
    return seen


def falling(origin: int, number: int) -> float:
    """Source 0 is learned, 1 is known, 2 gets worse."""
    return {0: 5.0 * 0.8**number, 1: 1.0, 2: 3.0 + 0.1 * number}[origin]


def test_shares_follow_progress_by_the_formula() -> None:
    stage = CurriculumStage(config_of(), 0, store_of())
    seen = run(stage, range(60), falling)
    rounds = {number: shares for number, shares, _ in seen}
    assert rounds[0] == rounds[1] == dict.fromkeys(range(3), pytest.approx(1 / 3))
    shown = dict.fromkeys(range(3), 0.0)
    for number in range(max(rounds)):
        if number >= 2:
            progress = {o: max(0.0, falling(o, number - 2) - falling(o, number - 1)) for o in range(3)}
            bonus = {o: math.sqrt(2 * math.log(number + 1) / (shown[o] + 1)) for o in range(3)}
            odds = {o: math.exp((progress[o] / progress[0] + bonus[o]) / 0.5) for o in range(3)}
            expected = {o: pytest.approx(odd / sum(odds.values())) for o, odd in odds.items()}
            assert rounds[number] == expected, number
        for o in range(3):
            shown[o] += rounds[number][o]
    assert min(s[0] for n, s in rounds.items() if n >= 2) > 0.4, "the one that is learned gets most"
    assert min(s[1] for s in rounds.values()) > 0.02, "none is forgotten"


def test_samples_of_a_source_are_gone_through_evenly() -> None:
    store = store_of()
    seen = run(CurriculumStage(config_of(), 0, store), range(80), falling)
    counts = Counter(m for _, _, members in seen for m in members)
    for origin in range(3):
        times = [counts[i] for i in np.flatnonzero(store.origins == origin)]
        assert max(times) - min(times) <= 2, "a pass, and the round that is not over"
    tokens = [sum(int(store.lengths[m]) for m in members) for _, _, members in seen]
    assert max(tokens) <= 120
    assert np.mean(tokens) > 0.75 * 120


def test_state_goes_through_json() -> None:
    """Saved after any step, also a round's last."""
    whole = run(CurriculumStage(config_of(), 0, store_of()), range(25), falling)
    for stop in range(25):
        first, second = (CurriculumStage(config_of(), 0, store_of()) for _ in range(2))
        begin = run(first, range(stop), falling)
        second.load_state(json.loads(json.dumps(first.state())))
        assert begin + run(second, range(stop, 25), falling) == whole


def test_state_is_of_its_step() -> None:
    """A checkpoint that is written in the background sees nothing of the steps beside it."""
    stage = CurriculumStage(config_of(), 0, store_of())
    for step in range(10):
        state = stage.state()
        before = json.dumps(state)
        run(stage, range(step, step + 1), falling)
        assert json.dumps(state) == before, step


def test_only_the_sources_of_the_stage() -> None:
    stage = CurriculumStage(config_of(weights={"a": 1, "c": 0.5}), 0, store_of())
    assert {s for _, shares, _ in run(stage, range(20), falling) for s in shares} == {0, 2}
    assert CurriculumStage(config_of(weights={"a": 0}), 0, store_of()).steps == 0


@pytest.mark.parametrize("stage", [{"max_steps": None}, {"drop_easy": 0.5}])
def test_what_it_cannot_be_with(stage: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r'curriculum: expected "none" without max_steps or beside drop_easy'):
        config_of(**stage)
