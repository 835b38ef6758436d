"""A core whose prompts a worker takes its time over: the same results, and no block let go too early."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from fake_model import FakeDrafter, FakeRunner, FakeTokenizer, Interrupted, next_token

from fastsft.engine.assemble import Assembly
from fastsft.engine.core import EngineCore
from fastsft.engine.request import Request, SamplingParams
from fastsft.engine.runner import Inputs


class Lost(RuntimeError):
    pass


class SlowPrefill:
    """Writes a job's tokens whenever it likes, until it says that it is done; dies at times."""

    def __init__(self, runner: FakeRunner, source: random.Random, deaths: float) -> None:
        self._runner, self._random, self._deaths = runner, source, deaths
        self._job: Inputs | None = None
        self.jobs = self.failures = 0

    def submit(self, inputs: Inputs) -> None:
        assert self._job is None, "two jobs at once"
        self._job = inputs
        self.jobs += 1

    def done(self, *, wait: bool) -> bool:
        assert self._job is not None, "no job"
        if self._random.random() < self._deaths:
            self._job = None
            raise Lost
        if not wait and self._random.random() < 0.7:
            return False
        self._runner.forward(self._job, torch.empty(0, dtype=torch.int64))
        self._job = None
        return True

    def renew(self, adapters: Iterable[Any] = ()) -> None:
        self._job = None


@pytest.mark.parametrize("seed", range(150))
def test_any_order_of_events_gives_the_same_tokens(seed: int) -> None:
    source = random.Random(seed)
    size = source.randint(1, 4)
    runner = FakeRunner(block_size=size, num_blocks=source.randint(-(-14 // size), 24))
    worker = SlowPrefill(runner, source, deaths=0.03 if seed % 3 == 0 else 0.0)
    core = EngineCore(
        runner, FakeTokenizer(), max_num_seqs=source.randint(1, 5),  # type: ignore[arg-type]
        max_batched_tokens=source.randint(1, 20), drafter=FakeDrafter(runner, seed) if seed % 2 else None,
        prefill=worker,
    )  # fmt: skip
    live: dict[str, Assembly] = {}
    ended = asked = aborted = 0
    while asked < 25 or core.busy:
        if asked < 25 and source.random() < 0.4:
            prompt = (*range(1, 1 + source.randint(0, 6)), source.randrange(7))
            params = SamplingParams(
                n=source.choice([1, 1, 2]), temperature=source.choice([0.0, 1.0]), seed=asked * 10, ignore_eos=True,
                max_tokens=source.randint(1, 14 - len(prompt)), prompt_logprobs=source.choice([None, None, 0]),
            )  # fmt: skip
            one = Assembly(Request(f"{asked}", prompt, params, source.choice([0, 0, 1])))
            core.add(one.request)
            live[one.request.request_id] = one
            asked += 1
        if live and source.random() < 0.05:
            core.abort(live.popitem()[0])
            aborted += 1
        runner.fail_next = seed % 3 == 1 and source.random() < 0.02  # half-way through a step, or a job
        try:
            updates = core.step()
        except (Lost, Interrupted):
            continue
        for update in updates:
            live[update.request_id].take(update)
        for name in [n for n, a in live.items() if a.finished == a.request.params.n]:
            one = live.pop(name)
            ended += 1
            for output in one.output().outputs:
                tokens, request = list(one.request.prompt_token_ids), one.request
                for place, token in enumerate(output.token_ids):
                    seed_ = (request.params.seed or 0) + output.index
                    assert token == next_token(0, tokens, request.params.temperature, seed_, place)
                    tokens.append(token)
    assert ended + aborted == asked
    assert worker.jobs
    assert not any(core._allocator._references)


def test_blocks_of_an_aborted_prompt_stay_until_the_worker_is_done() -> None:
    runner = FakeRunner(block_size=2, num_blocks=8)
    source = random.Random(0)
    worker = SlowPrefill(runner, source, 0.0)
    core = EngineCore(runner, FakeTokenizer(), prefill=worker)  # type: ignore[arg-type]
    core.add(Request("short", (1,), SamplingParams(max_tokens=4, ignore_eos=True)))
    while not core.stats().running:
        core.step()
    core.add(Request("long", (1, 2, 3, 4, 5, 6), SamplingParams(max_tokens=1)))
    source.random = lambda: 0.5  # type: ignore[method-assign]  # not done before it is waited for
    core.step()
    held = core.stats().free_blocks
    assert core.abort("long")
    assert core.stats().free_blocks == held
    core.abort("short")
    assert core.busy
    assert core.step() == []
    assert core.stats().free_blocks == 8
    assert not core.busy


def test_a_prompt_under_way_is_not_given_up_for_a_block() -> None:
    runner = FakeRunner(block_size=2, num_blocks=6)
    source = random.Random(0)
    source.random = lambda: 0.5  # type: ignore[method-assign]  # not done before it is waited for
    core = EngineCore(runner, FakeTokenizer(), prefill=SlowPrefill(runner, source, 0.0))  # type: ignore[arg-type]
    core.add(Request("short", (1,), SamplingParams(max_tokens=11, ignore_eos=True)))
    core.step()
    core.add(Request("long", (1, 2, 3, 4, 5, 6), SamplingParams(max_tokens=1)))
    ended = [u.request_id for _ in range(40) for u in core.step() if u.finish_reason]
    assert ended == ["long", "short"]
    assert core.stats().preemptions == 1
    assert core.stats().free_blocks == 6
