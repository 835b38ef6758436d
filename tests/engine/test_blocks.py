"""The allocator and the scheduler alone: no block is lost or written by two, and every sequence gets its turn."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsft.engine.blocks import BlockAllocator, OutOfBlocks
from fastsft.engine.request import SamplingParams
from fastsft.engine.scheduler import Scheduler
from fastsft.engine.sequence import Sequence


class NoText:
    """In place of a detokenizer: these sequences have no text."""

    text = ""

    def push(self, token: int) -> None:
        pass

    def flush(self) -> None:
        pass


def sequence(number: int, prompt: int, generate: int, index: int = 0) -> Sequence:
    params = SamplingParams(max_tokens=generate)
    return Sequence(str(number), index, [1] * prompt, prompt, prompt + generate, params, NoText(), 0)  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.data())
def test_allocator_against_a_model(num_blocks: int, data: st.DataObject) -> None:
    allocator = BlockAllocator(num_blocks)
    holders: list[list[int]] = []
    for _ in range(data.draw(st.integers(0, 30))):
        action = data.draw(st.sampled_from(["allocate", "share", "release"]))
        if action == "allocate":
            count = data.draw(st.integers(0, num_blocks + 1))
            free = num_blocks - len({b for h in holders for b in h})
            if count > free:
                with pytest.raises(OutOfBlocks):
                    allocator.allocate(count)
            else:
                taken = allocator.allocate(count)
                assert len(set(taken)) == count
                assert not set(taken) & {b for h in holders for b in h}, "handed out twice"
                holders.append(taken)
        elif holders:
            i = data.draw(st.integers(0, len(holders) - 1))
            if action == "share":
                allocator.share(holders[i])
                holders.append(list(holders[i]))
            else:
                allocator.release(holders.pop(i))
        assert allocator.num_free == num_blocks - len({b for h in holders for b in h})
    for blocks in holders:
        allocator.release(blocks)
    assert sorted(allocator.allocate(num_blocks)) == list(range(num_blocks))


REQUEST = st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(1, 3))  # prompt, tokens to generate, n


@settings(max_examples=250, deadline=None)
@given(
    st.lists(REQUEST, min_size=1, max_size=10),
    st.integers(1, 5), st.integers(0, 12), st.integers(1, 5), st.integers(1, 25), st.data(),
)  # fmt: skip
def test_every_sequence_finishes_and_nothing_leaks(
    requests: list[tuple[int, int, int]],
    block_size: int, spare: int, max_num_seqs: int, max_batched_tokens: int, data: st.DataObject,
) -> None:  # fmt: skip
    """Drives the scheduler as the engine does, requests arriving at any time, with a cache that barely fits the
    longest sequence."""
    longest = max(prompt + generate for prompt, generate, _ in requests)
    num_blocks = -(-longest // block_size) + spare
    allocator = BlockAllocator(num_blocks)
    scheduler = Scheduler(
        allocator, block_size=block_size, max_num_seqs=max_num_seqs, max_batched_tokens=max_batched_tokens
    )
    groups = []
    for number, (prompt, generate, n) in enumerate(requests):
        group = [sequence(number, prompt, generate, i) for i in range(n)]
        group[0].siblings = group[1:]
        groups.append(group)
    everyone = [s for g in groups for s in g]
    arriving = [g[0] for g in groups]
    steps = 0
    oldest, best = None, -1
    while arriving or scheduler.busy:
        while arriving and (not scheduler.busy or data.draw(st.booleans())):
            scheduler.add(arriving.pop(0))
        step = scheduler.schedule()
        steps += 1
        assert steps < 5000, "no end"
        assert step.work, "a step without work"
        assert len(scheduler.running) <= max_num_seqs
        counts = [c for _, c in step.work]
        if step.prefill:
            assert sum(counts) <= max_batched_tokens
        else:
            assert set(counts) == {1}
        check_blocks(scheduler, allocator)
        # the one admitted first is never the one that is preempted
        first = scheduler.running[0]
        progress = len(first.tokens)
        assert first is not oldest or progress >= best
        oldest, best = first, progress
        complete = []
        written: Counter[int] = Counter()
        for s, count in step.work:
            end = s.computed + count
            assert end <= len(s.tokens)
            assert end <= len(s.blocks) * block_size, "tokens without a place in the cache"
            written.update({s.blocks[p // block_size] for p in range(s.computed, end)})
            s.computed = end
            if end == len(s.tokens):
                complete.append(s)
        assert {allocator._references[b] for b in written} == {1}, "a shared block written"
        if step.prefill:
            for parent in list(complete):
                for child in parent.siblings:
                    scheduler.fork(parent, child)
                    if child.computed:
                        assert child.computed == parent.computed
                        complete.append(child)
                parent.siblings = []
                check_blocks(scheduler, allocator)
        for s in complete:
            s.append(5, ())
            if s.finish_reason is not None:
                scheduler.finish(s)
    assert [s.generated for s in everyone] == [g for _, g, n in requests for _ in range(n)]
    assert allocator.num_free == num_blocks
    assert not any(allocator._references)


def check_blocks(scheduler: Scheduler, allocator: BlockAllocator) -> None:
    """References are exactly the blocks that running sequences hold; who waits holds none."""
    held = Counter(b for s in scheduler.running for b in s.blocks)
    assert [held[b] for b in range(allocator.num_blocks)] == allocator._references
    assert allocator.num_free == allocator.num_blocks - len(held)
    assert not any(s.blocks for s in scheduler.waiting)
    assert all(len(set(s.blocks)) == len(s.blocks) for s in scheduler.running)


def test_preemption_takes_the_newest_and_keeps_its_tokens() -> None:
    allocator = BlockAllocator(4)
    scheduler = Scheduler(allocator, block_size=2, max_num_seqs=4, max_batched_tokens=100)
    old, new = sequence(0, 4, 4), sequence(1, 3, 4)
    scheduler.add(old)
    scheduler.add(new)
    for s, count in scheduler.schedule().work:
        s.computed += count
        s.append(5, ())
    step = scheduler.schedule()
    assert [s.request_id for s, _ in step.work] == ["0"]
    assert scheduler.preemptions == 1
    assert list(scheduler.waiting) == [new]
    assert (new.computed, new.generated, new.blocks) == (0, 1, [])


def test_requests_are_admitted_in_order() -> None:
    """A short one behind a long one that does not fit yet waits: otherwise the long one could wait for ever."""
    scheduler = Scheduler(BlockAllocator(6), block_size=1, max_num_seqs=4, max_batched_tokens=100)
    for number, prompt in enumerate((3, 5, 1)):
        scheduler.add(sequence(number, prompt, 1))
    assert [s.request_id for s, _ in scheduler.schedule().work] == ["0"]
