"""The core under every order of events: arrivals, aborts, priorities, drafts, new weights, steps that fail, caches that
hold hardly one sequence. The model reads its context from the cache, so that a wrong block is a wrong token."""

from __future__ import annotations

from collections import Counter
from typing import Any

import hypothesis.strategies as st
from fake_model import FakeDrafter, FakeRunner, FakeTokenizer, Interrupted, next_token
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fastsft.engine.core import EngineCore
from fastsft.engine.request import Request, SamplingParams, Update
from fastsft.engine.step import Drafter, Step


class CoreStates(RuleBasedStateMachine):
    @initialize(
        block_size=st.integers(1, 4), num_blocks=st.integers(1, 14), max_num_seqs=st.integers(1, 4),
        max_batched_tokens=st.integers(1, 20), drafts=st.booleans(), seed=st.integers(0, 1000),
    )  # fmt: skip
    def start(
        self, block_size: int, num_blocks: int, max_num_seqs: int, max_batched_tokens: int, drafts: bool, seed: int
    ) -> None:
        self.runner = FakeRunner(block_size=block_size, num_blocks=max(num_blocks, -(-12 // block_size)))
        drafter = FakeDrafter(self.runner, seed) if drafts else None
        self.core = EngineCore(
            self.runner, FakeTokenizer(), max_num_seqs=max_num_seqs,  # type: ignore[arg-type]
            max_batched_tokens=max_batched_tokens, drafter=drafter,
        )  # fmt: skip
        self.max_num_seqs, self.max_batched_tokens = max_num_seqs, max_batched_tokens
        self.capacity = self.runner.num_blocks * block_size
        self.live: dict[str, Request] = {}
        self.written: dict[tuple[str, int], list[int]] = {}
        self.ended: Counter[str] = Counter()
        self.asked = 0
        self.watch_steps()

    def watch_steps(self) -> None:
        """Check each plan before it runs."""
        scheduler = self.core._scheduler
        plain = scheduler.schedule

        def schedule(drafter: Drafter | None = None) -> Step:
            before = {s: len(s.tokens) - s.computed for s in scheduler.running}
            step = plain(drafter)
            assert step.work, "a step without work"
            assert len(scheduler.running) <= self.max_num_seqs
            chunks = [w.count for w in step.work if before.get(w.sequence) != 1]
            assert sum(chunks) <= self.max_batched_tokens
            assert len({w.sequence for w in step.work}) == len(step.work)
            held = Counter(b for s in scheduler.running for b in s.blocks)
            held.update(b for s in scheduler.running for fork in s.forks for b in fork.blocks[fork.shared :])
            for w in step.work:
                s = w.sequence
                own = w.count - sum(1 + len(fork.draft) for fork in s.forks)
                assert own >= 1
                assert s.computed + own <= len(s.blocks) * scheduler.block_size
                for fork in s.forks:
                    assert fork.shared == s.computed // scheduler.block_size
                    assert fork.blocks[: fork.shared] == s.blocks[: fork.shared]
                    assert all(held[b] == 1 for b in fork.blocks[fork.shared :])
                    assert len(s.tokens) + len(fork.draft) <= len(fork.blocks) * scheduler.block_size
                    assert len(s.tokens) + len(fork.draft) < s.limit
                assert len(s.tokens) + len(s.draft) < s.limit or not s.draft
                touched = range(s.computed // scheduler.block_size, (s.computed + own - 1) // scheduler.block_size + 1)
                for i in touched:
                    readers = [o for o in scheduler.running if s.blocks[i] in o.blocks and o is not s]
                    # others may hold a block that is being filled only if they wait for nothing in it but this step
                    assert held[s.blocks[i]] == 1 or all(o.computed >= (i + 1) * scheduler.block_size for o in readers)
            return step

        scheduler.schedule = schedule  # type: ignore[method-assign]

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=11), n=st.integers(1, 3),
        max_tokens=st.integers(1, 12), priority=st.integers(0, 2), seed=st.integers(0, 3),
        temperature=st.sampled_from([0.0, 1.0]), stop=st.sampled_from([(), ("ab",), ("c", "dd")]),
    )  # fmt: skip
    def add(self, prompt: list[int], priority: int, **params: Any) -> None:
        request = Request(f"{self.asked}", tuple(prompt), SamplingParams(**params), priority)
        self.asked += 1
        self.core.add(request)
        self.live[request.request_id] = request

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.live)))
        assert self.core.abort(name)
        del self.live[name]

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.take(self.core.step())

    @precondition(lambda self: self.core.busy)
    @rule()
    def fail(self) -> None:
        self.runner.fail_next = True
        try:
            self.core.step()
        except Interrupted:
            return
        raise AssertionError("no failure")

    @rule()
    def new_weights(self) -> None:
        assert self.core.update_weights(None) == self.runner.version  # type: ignore[arg-type]

    def take(self, updates: list[Update]) -> None:
        seen = [(u.request_id, u.index) for u in updates]
        assert len(set(seen)) == len(seen)
        for u in updates:
            request = self.live[u.request_id]
            params = request.params
            tokens = self.written.setdefault((u.request_id, u.index), list(request.prompt_token_ids))
            assert u.token_ids
            assert u.weight_version == self.runner.version
            for token in u.token_ids:
                place = len(tokens) - len(request.prompt_token_ids)
                expected = next_token(self.runner.version, tokens, params.temperature, params.seed + u.index, place)  # type: ignore[operator]
                assert token == expected
                tokens.append(token)
            text = "".join("abcdefg"[t] for t in tokens[len(request.prompt_token_ids) :])
            stopped = next((s for s in params.stop if s in text), None)
            full = len(tokens) == min(len(request.prompt_token_ids) + params.max_tokens, self.capacity)
            assert u.finish_reason == ("stop" if stopped else "length" if full else None)
            if u.finish_reason:
                self.ended[u.request_id] += 1
                if self.ended[u.request_id] == params.n:
                    del self.live[u.request_id]

    @invariant()
    def references_are_exact(self) -> None:
        if not hasattr(self, "core"):
            return
        scheduler, allocator = self.core._scheduler, self.core._allocator
        held = Counter(b for s in scheduler.running for b in s.blocks)
        assert [held[b] for b in range(allocator.num_blocks)] == allocator._references
        assert allocator.num_free == allocator.num_blocks - len(held)
        everywhere = [*allocator._free, *allocator._cached, *held]
        assert sorted(everywhere) == list(range(allocator.num_blocks))
        assert allocator._blocks == {key: block for block, key in allocator._keys.items()}
        assert set(allocator._cached) <= set(allocator._keys)
        assert not set(allocator._free) & set(allocator._keys)
        assert not any(s.blocks or s.computed for s in scheduler.waiting)
        assert not any(s.forks for s in [*scheduler.waiting, *scheduler.running])
        assert all(s.computed <= len(s.blocks) * scheduler.block_size for s in scheduler.running)
        assert set(self.core._live) == set(self.live)

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        # The first in order advances in every step, by one token or one chunk, and is never preempted for another.
        most = sum((len(r.prompt_token_ids) + 2 * r.params.max_tokens) * r.params.n for r in self.live.values())
        steps = 0
        while self.core.busy:
            self.take(self.core.step())
            self.references_are_exact()
            steps += 1
            assert steps <= most, "no end"
        assert not self.live
        stats = self.core.stats()
        assert stats.free_blocks == stats.blocks
        assert not any(self.core._allocator._references)
        assert stats.accepted_tokens <= stats.drafted_tokens
        for (name, index), tokens in self.written.items():
            assert tokens, (name, index)


TestCoreStates = CoreStates.TestCase
TestCoreStates.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    report_multiple_bugs=False,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
