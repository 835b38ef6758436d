"""Who goes first, who gives way, what a step is made of."""

from __future__ import annotations

from typing import Any

import pytest
from fake_model import FakeRunner, FakeTokenizer, Interrupted, next_token

from fastsft.engine.core import EngineCore
from fastsft.engine.request import Request, SamplingParams
from fastsft.engine.sequence import Sequence
from fastsft.engine.step import Step


def core_of(block_size: int, num_blocks: int, **options: Any) -> EngineCore:
    runner = FakeRunner(block_size=block_size, num_blocks=num_blocks)
    return EngineCore(runner, FakeTokenizer(), **options)  # type: ignore[arg-type]


def add(core: EngineCore, name: str, prompt: list[int], tokens: int = 4, priority: int = 0, n: int = 1) -> None:
    core.add(Request(name, tuple(prompt), SamplingParams(max_tokens=tokens, n=n, temperature=1.0, seed=0), priority))


def plan(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """The next step's work, which is run: (request, tokens, rows of logits)."""
    seen: list[Step] = []
    original = core._scheduler.schedule
    with monkeypatch.context() as patch:
        patch.setattr(core._scheduler, "schedule", lambda drafter: seen.append(original(drafter)) or seen[-1])
        core.step()
    return [(w.sequence.request_id, w.count, w.rows) for w in seen[0].work]


def test_generation_goes_on_beside_chunks_of_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt that arrives does not hold up who generates, and shares the step with it."""
    core = core_of(4, 32, max_batched_tokens=5)
    add(core, "short", [1, 2])
    assert plan(core, monkeypatch) == [("short", 2, 1)]
    add(core, "long", [i % 7 for i in range(12)])
    assert plan(core, monkeypatch) == [("short", 1, 1), ("long", 5, 0)]
    assert plan(core, monkeypatch) == [("short", 1, 1), ("long", 5, 0)]
    assert plan(core, monkeypatch) == [("short", 1, 1), ("long", 2, 1)]
    assert plan(core, monkeypatch) == [("long", 1, 1)]


def test_the_last_in_order_gives_way_and_keeps_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    core = core_of(2, 4)
    add(core, "old", [1, 2, 3, 4])
    add(core, "new", [5, 5, 5])
    assert plan(core, monkeypatch) == [("old", 4, 1), ("new", 3, 1)]
    (new,) = core._live["new"]
    assert plan(core, monkeypatch) == [("old", 1, 1)]
    assert core.stats().preemptions == 1
    assert core._scheduler.waiting == [new]
    assert (new.computed, new.generated, len(new.blocks)) == (0, 1, 0)


def test_requests_are_admitted_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short one behind a long one that does not fit yet waits: otherwise the long one could wait for ever."""
    core = core_of(1, 7)
    for name, prompt in (("a", [1] * 3), ("b", [2] * 5), ("c", [3])):
        add(core, name, prompt, tokens=2)
    assert plan(core, monkeypatch) == [("a", 3, 1)]
    assert plan(core, monkeypatch) == [("a", 1, 1)]
    assert plan(core, monkeypatch) == [("b", 5, 1), ("c", 1, 1)]


def test_a_lower_priority_goes_first_and_makes_room_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    core = core_of(2, 6, max_num_seqs=2)
    add(core, "late", [1, 2, 3, 4], priority=5)
    add(core, "later", [2, 2, 3, 4], priority=5)
    assert plan(core, monkeypatch) == [("late", 4, 1), ("later", 4, 1)]
    add(core, "normal", [3, 3])
    add(core, "urgent", [4], priority=-1)
    assert plan(core, monkeypatch) == [("late", 1, 1), ("urgent", 1, 1)]
    assert plan(core, monkeypatch) == [("urgent", 1, 1), ("normal", 2, 1)]
    assert [s.request_id for s in core._scheduler.waiting] == ["late", "later"]


def test_a_prompt_is_computed_once_by_those_that_share_it() -> None:
    """Even in one batch, and although the budget cuts it: the second waits for what the first computes."""
    for budget in (3, 100):
        core = core_of(4, 40, max_batched_tokens=budget)
        prompt = [i % 5 for i in range(21)]
        for name in "abc":
            add(core, name, [*prompt, "abc".index(name)], tokens=1)
        while core.busy:
            core.step()
        assert core.stats().found_tokens == 2 * 20
        assert core._runner.computed == 3 * 22 - 40  # type: ignore[attr-defined]
        add(core, "d", prompt[:12], tokens=1)
        core.step()
        assert core.stats().found_tokens == 40 + 8, "the last block is computed: the logits after it are wanted"


def test_what_is_evicted_is_computed_again() -> None:
    core = core_of(4, 6)
    for prompt, found in (([1] * 9, 0), ([1] * 9, 8), ([2] * 17, 0), ([1] * 9, 4), ([1] * 9, 8)):
        before = core.stats().found_tokens
        add(core, "x", prompt, tokens=1)
        core.step()
        assert core.stats().found_tokens - before == found
    assert core.stats().evictions == 2


def test_continuations_copy_a_shared_block_when_they_write() -> None:
    """Two full blocks and a part: three continuations hold the full ones together and one of three writes in place."""
    core = core_of(4, 5)
    add(core, "x", [1] * 10, tokens=2, n=3)
    core.step()
    assert core.stats().free_blocks == 2
    assert core._allocator.references(core._live["x"][0].blocks[2]) == 3
    core.step()
    assert core.stats().preemptions == 0
    assert not core.busy


def test_new_weights_find_nothing_of_the_old() -> None:
    core = core_of(4, 40)
    add(core, "x", [1] * 9, tokens=6)
    core.step()
    assert core.update_weights(None) == 1  # type: ignore[arg-type]
    (update,) = core.step()
    assert update.weight_version == 1
    assert core.stats().preemptions == 0, "that is for want of room"
    assert core.stats().found_tokens == 0
    (sequence,) = core._live["x"]
    assert sequence.tokens[10] == next_token(1, sequence.tokens[:10], 1.0, 0, 1)


def test_blocks_of_old_weights_are_evicted_first() -> None:
    core = core_of(4, 6)
    add(core, "old", [1] * 9, tokens=1)
    core.step()
    core.update_weights(None)  # type: ignore[arg-type]
    add(core, "new", [2] * 13, tokens=1)
    core.step()
    assert (core.stats().cached_blocks, core.stats().evictions) == (5, 0)
    add(core, "newer", [3] * 9, tokens=1)
    core.step()
    assert core.stats().evictions == 2
    add(core, "new", [2] * 13, tokens=1)
    core.step()
    assert core.stats().found_tokens == 12


def test_a_step_that_failed_leaves_nothing_to_be_found() -> None:
    """The second request would have read, in the same step, what the first one wrote."""
    core = core_of(4, 40)
    add(core, "a", [1] * 9)
    add(core, "b", [1] * 9, tokens=2)
    core._runner.fail_next = True  # type: ignore[attr-defined]
    with pytest.raises(Interrupted):
        core.step()
    core.abort("a")
    (first,), (second,) = core.step(), core.step()
    assert [*first.token_ids, *second.token_ids] == [
        next_token(0, [1] * 9, 1.0, 0, 0),
        next_token(0, [1] * 9 + list(first.token_ids), 1.0, 0, 1),
    ]


class Eager:
    """Drafts as many tokens as it may."""

    def begin(self, sequences: int) -> bool:
        return True

    def propose(self, sequence: Sequence, limit: int) -> list[list[int]]:
        return [[0] * limit]

    def observe(self, sequence: Sequence, paths: list[list[int]], best: int, accepted: int) -> None:
        pass

    def forget(self, sequence: Sequence) -> None:
        pass

    def measured(self, rows: int, seconds: float) -> None:
        pass


def test_drafts_take_no_block_from_anybody_and_give_theirs_back() -> None:
    core = core_of(2, 8, drafter=Eager())
    add(core, "a", [1, 2, 3], tokens=12)
    add(core, "b", [4, 5, 6], tokens=12)
    core.step()
    core.step()
    stats = core.stats()
    assert (stats.preemptions, stats.running) == (0, 2)
    assert stats.drafted_tokens == 8, "four blocks were left"
    held = {s.request_id: len(s.blocks) for s in core._scheduler.running}
    assert held == {s.request_id: -(-s.computed // 2) for s in core._scheduler.running}


def test_who_has_siblings_to_fork_drafts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """They draw from the logits after the prompt, which would be followed by drafts."""
    core = core_of(2, 20, drafter=Eager(), max_batched_tokens=4)
    add(core, "a", [1, 2, 3, 4, 5], tokens=6, n=2)
    assert plan(core, monkeypatch) == [("a", 4, 0)]
    assert plan(core, monkeypatch) == [("a", 1, 1)]
    assert plan(core, monkeypatch) == [("a", 5, 5), ("a", 5, 5)]
