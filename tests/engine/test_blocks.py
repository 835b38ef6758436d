"""The allocator alone: no block is lost or handed out twice, and what is found is what was published last."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsft.engine.blocks import BlockAllocator, OutOfBlocks, chain_key


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 8), st.data())
def test_allocator_against_a_model(num_blocks: int, data: st.DataObject) -> None:
    """The model: who holds what, and the published blocks that nobody holds, the one let go the longest ago first."""
    allocator = BlockAllocator(num_blocks)
    holders: list[list[int]] = []
    names: dict[int, bytes] = {}
    idle: list[int] = []
    evictions = 0
    for _ in range(data.draw(st.integers(0, 40))):
        held = Counter(b for h in holders for b in h)
        action = data.draw(st.sampled_from(["allocate", "share", "release", "publish", "find", "clear"]))
        if action == "allocate":
            count = data.draw(st.integers(0, num_blocks + 1))
            if count > num_blocks - len(held):
                with pytest.raises(OutOfBlocks):
                    allocator.allocate(count)
                continue
            taken = allocator.allocate(count)
            assert len(set(taken)) == count
            assert not set(taken) & set(held), "handed out twice"
            evicted = max(0, count - (num_blocks - len(held) - len(idle)))
            assert set(taken) & set(idle) == set(idle[:evicted]), "not the one let go the longest ago"
            evictions += evicted
            for block in idle[:evicted]:
                del names[block]
            idle = idle[evicted:]
            holders.append(taken)
        elif action == "find":
            keys = [bytes([data.draw(st.integers(0, 5))]) for _ in range(data.draw(st.integers(0, 3)))]
            found = allocator.find(keys)
            assert [names[b] for b in found] == keys[: len(found)]
            assert len(found) == len(keys) or keys[len(found)] not in names.values()
            if found and len(set(found)) == len(found):
                allocator.share(found)
                holders.append(found)
                idle = [b for b in idle if b not in found]
        elif action == "clear":
            allocator.clear()
            holders, names, idle = [], {}, []
        elif holders:
            chosen = data.draw(st.sampled_from(range(len(holders))))
            if action == "share":
                allocator.share(holders[chosen])
                holders.append(list(holders[chosen]))
            elif action == "release":
                mine = holders.pop(chosen)
                allocator.release(mine)
                now = Counter(b for h in holders for b in h)
                idle += [b for b in reversed(mine) if b not in now and b in names]
            elif holders[chosen]:
                block = data.draw(st.sampled_from(holders[chosen]))
                name = bytes([data.draw(st.integers(0, 5))])
                if block not in names:
                    allocator.publish(block, name)
                    if name not in names.values():
                        names[block] = name
        held = Counter(b for h in holders for b in h)
        assert [allocator.references(b) for b in range(num_blocks)] == [held[b] for b in range(num_blocks)]
        assert allocator.num_free == num_blocks - len(held)
        assert allocator.num_cached == len(idle)
        assert allocator.evictions == evictions
    for blocks in holders:
        allocator.release(blocks)
    assert sorted(allocator.allocate(num_blocks)) == list(range(num_blocks))


def test_the_end_of_a_prefix_is_evicted_before_its_beginning() -> None:
    allocator = BlockAllocator(3)
    blocks = allocator.allocate(3)
    for i, block in enumerate(blocks):
        allocator.publish(block, bytes([i]))
    allocator.release(blocks)
    for left in (2, 1, 0):
        allocator.allocate(1)
        assert len(allocator.find([b"\0", b"\1", b"\2"])) == left


def test_a_key_names_the_whole_prefix() -> None:
    keys = [chain_key(b"", [1, 2]), chain_key(b"", [2, 1]), chain_key(b"", [1]), chain_key(b"weights 1", [1, 2])]
    keys += [chain_key(keys[0], [3, 4]), chain_key(keys[1], [3, 4])]
    assert len(set(keys)) == 6
    assert keys[4] == chain_key(chain_key(b"", [1, 2]), [3, 4])
