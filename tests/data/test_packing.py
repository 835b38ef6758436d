"""Batches: every sample once per epoch, within capacity, in an order that only (seed, epoch) decide."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsft.data.batch import IGNORE, Sample, collate
from fastsft.data.loader import PackedLoader, sequential_packs
from fastsft.data.packing import StreamPacker
from fastsft.data.store import SampleStore, write_store


def store_of(lengths: list[int]) -> SampleStore:
    """Every token of the store has an id of its own, so that it can be followed."""
    starts = np.cumsum([0, *lengths])
    return SampleStore.from_samples(
        Sample(np.arange(a, a + n, dtype=np.int32), np.full(n, 0.5, np.float32), f"s{i}")
        for i, (a, n) in enumerate(zip(starts[:-1], lengths, strict=True))
    )


def plan(store: SampleStore, capacity: int, seed: int, epoch: int) -> list[tuple[str, ...]]:
    loader = PackedLoader(store, capacity=capacity, seed=seed)
    return [loader.batch(epoch, i).sources for i in range(loader.num_batches(epoch))]


LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=40)


@settings(max_examples=80, deadline=None)
@given(LENGTHS, st.integers(30, 90), st.integers(0, 2**62), st.integers(0, 5))
def test_every_token_once_within_capacity(lengths: list[int], capacity: int, seed: int, epoch: int) -> None:
    store = store_of(lengths)
    loader = PackedLoader(store, capacity=capacity, seed=seed)
    batches = [loader.batch(epoch, i) for i in range(loader.num_batches(epoch))]
    assert sorted(torch.cat([b.ids for b in batches]).tolist()) == list(range(sum(lengths)))
    assert sorted(s for b in batches for s in b.sources) == sorted(f"s{i}" for i in range(len(lengths)))
    for batch in batches:
        assert batch.num_tokens <= capacity
        check_layout(batch.ids, batch.targets, batch.position_ids, batch.cu_seqlens)
    # Nearly full: no two batches would fit into one, but for the groups that samples are joined into.
    assert len(batches) <= 2 * sum(lengths) // capacity + 2


def check_layout(ids: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    bounds = cu_seqlens.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == len(ids)
    for a, b in itertools.pairwise(bounds):
        assert positions[a:b].tolist() == list(range(b - a))
        if b > a:
            assert targets[a : b - 1].tolist() == ids[a + 1 : b].tolist()
            assert targets[b - 1] == IGNORE


@settings(max_examples=30, deadline=None)
@given(LENGTHS, st.integers(0, 2**62), st.integers(0, 5))
def test_order_is_a_function_of_seed_and_epoch(lengths: list[int], seed: int, epoch: int) -> None:
    store = store_of(lengths)
    whole = plan(store, 40, seed, epoch)
    loader = PackedLoader(store, capacity=40, seed=seed)
    for other in (epoch + 3, epoch, 0, epoch + 1):  # asked in any order, with the cache of plans overflowing
        loader.batch(other, 0)
    assert [loader.batch(epoch, i).sources for i in reversed(range(len(whole)))][::-1] == whole


def test_batches_are_nearly_full_and_mixed() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 200, 2000).tolist()
    store = store_of(lengths)
    batches = plan(store, 2048, 0, 0)
    assert len(batches) <= 1.01 * sum(lengths) / 2048 + 1
    means = np.array([np.mean([lengths[int(s[1:])] for s in b]) for b in batches[:-1]])
    # Batches of about 20 random lengths: their means spread as those of random draws do, not as of sorted ones.
    assert means.std() < 2.5 * np.std(lengths) / 20**0.5


def test_gaps_between_groups_are_filled() -> None:
    lengths = np.random.default_rng(0).integers(60, 200, 10_000)  # groups of just below an eighth of a batch
    store = SampleStore.from_samples(Sample(np.zeros(n, np.int32), np.zeros(n, np.float32)) for n in lengths)
    batches = PackedLoader(store, capacity=8192, seed=0).num_batches(0)
    assert batches <= 1.005 * lengths.sum() / 8192 + 1


def test_epochs_and_seeds_differ() -> None:
    store = store_of([7] * 40)
    plans = [plan(store, 21, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(p) for p in plans}) == 4
    members = [{frozenset(b) for b in p} for p in plans]
    assert all(a != b for i, a in enumerate(members) for b in members[:i]), "neighbours change too, not only the order"


def test_long_batches_do_not_come_first() -> None:
    lengths = [40] * 10 + [3] * 30
    longest = [i for i, b in enumerate(plan(store_of(lengths), 40, 0, 0)) if len(b) == 1]
    assert max(longest) > 9


def test_untrained_targets_are_ignored() -> None:
    weights = np.array([1, 0, 0.5, 0], np.float32)
    batch = collate([Sample(np.arange(4, dtype=np.int32), weights), Sample(np.arange(1, dtype=np.int32), weights[:1])])
    assert batch.targets.tolist() == [IGNORE, 2, IGNORE, IGNORE, IGNORE]
    assert batch.weights.tolist() == [0, 0.5, 0, 0, 0]
    empty = collate([])
    assert empty.num_tokens == 0
    assert empty.cu_seqlens.tolist() == [0]


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.data())
def test_a_batch_of_the_store_is_its_samples_collated(lengths: list[int], data: st.DataObject) -> None:
    store = store_of(lengths)
    numbers = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=6))
    batch, expected = store.batch(np.array(numbers, np.int64)), collate([store[i] for i in numbers])
    for name in ("ids", "position_ids", "targets", "weights", "cu_seqlens"):
        ours, theirs = getattr(batch, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs), name
    assert batch.sources == expected.sources == tuple(f"s{i}" for i in numbers)
    check_layout(batch.ids, batch.targets, batch.position_ids, batch.cu_seqlens)


def test_sequential_packs_hold_everything() -> None:
    store = store_of([5, 9, 1, 12, 3])
    packs = sequential_packs(store, capacity=10)
    assert sorted(np.concatenate(packs).tolist()) == list(range(5))
    assert all(store.lengths[members].sum() <= 12 for members in packs), "the longest sample sets the capacity"
    assert sequential_packs(store_of([]), capacity=14) == []


def test_what_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="empty"):
        PackedLoader(store_of([]), capacity=8, seed=0)
    with pytest.raises(ValueError, match="capacity"):
        PackedLoader(store_of([3, 9]), capacity=8, seed=0).num_batches(0)


def test_store_on_disk_equals_the_one_in_memory(tmp_path: object) -> None:
    memory = store_of([3, 0, 7, 1])
    disk = write_store(f"{tmp_path}/store", [memory[i] for i in range(len(memory))], note=1)
    assert disk.manifest["note"] == 1
    for i in range(len(memory)):
        assert np.array_equal(disk[i].ids, memory[i].ids)
        assert np.array_equal(disk[i].weights, memory[i].weights)
        assert disk[i].source == memory[i].source
    assert disk.lengths.tolist() == [3, 0, 7, 1]
    assert disk.num_tokens == 11
    assert disk.trained_tokens == 2 + 6
    for index in (4, -1):
        with pytest.raises(IndexError, match=f"sample {index} of 4"):
            disk[index]


@pytest.mark.parametrize("damage", ["ids", "weights", "lengths", "origins", "sources"])
def test_damaged_store_is_refused(damage: str, tmp_path: object) -> None:
    write_store(f"{tmp_path}/store", [store_of([3, 4])[i] for i in range(2)])
    if damage == "sources":
        with open(f"{tmp_path}/store/sources.txt", "w") as stream:
            stream.write("s0\n")
    else:
        file = f"{tmp_path}/store/{damage}.npy"
        np.save(file, np.load(file)[:-1])
    with pytest.raises(ValueError, match="damaged sample store"):
        SampleStore.open(f"{tmp_path}/store")


# --- streams --------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=60), st.integers(12, 30), st.integers(1, 5), st.data())
def test_a_stream_is_packed_once_and_resumes(
    lengths: list[int], capacity: int, open_bins: int, data: st.DataObject
) -> None:
    packer = StreamPacker(capacity=capacity, open_bins=open_bins)
    bins: list[list[int]] = []
    for i, length in enumerate(lengths):
        bins += packer.push(length)
        assert packer.taken == i + 1
        assert sum(map(len, packer.state_dict()["bins"])) <= 3 * open_bins
        held = [m for _, _, members in packer.state_dict()["bins"] for m in members]
        assert sorted([m for b in bins for m in b] + held) == list(range(i + 1))
    bins += packer.flush()
    assert sorted(m for b in bins for m in b) == list(range(len(lengths)))
    assert all(sum(lengths[m] for m in b) <= capacity and b == sorted(b) for b in bins)
    stop = data.draw(st.integers(0, len(lengths)))
    first = StreamPacker(capacity=capacity, open_bins=open_bins)
    resumed = [b for length in lengths[:stop] for b in first.push(length)]
    second = StreamPacker(capacity=capacity, open_bins=open_bins)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.taken == stop
    assert resumed + list(second.pack(lengths[stop:])) == bins


def test_a_stream_goes_where_it_fits_best() -> None:
    packer = StreamPacker(capacity=10, open_bins=2)
    closed = [packer.push(n) for n in (6, 7, 3, 3, 5, 5)]
    # 3 fills the bin with 7; the second 3 leaves room 1 beside 6; 5 opens a third bin and 5 fills it.
    assert closed == [[], [], [[1, 2]], [], [], [[4, 5]]]
    assert packer.flush() == [[0, 3]]
    packer = StreamPacker(capacity=10, open_bins=1)
    assert [packer.push(n) for n in (6, 7)] == [[], [[1]]], "the fullest is closed"


def test_a_stream_fills_its_bins() -> None:
    lengths = np.minimum(np.random.default_rng(0).lognormal(6, 1, 20_000).astype(int) + 1, 8192).tolist()
    for open_bins, least in ((8, 0.98), (64, 0.99)):
        bins = list(StreamPacker(capacity=8192, open_bins=open_bins).pack(lengths))
        assert sum(lengths) / (8192 * len(bins)) > least


def test_a_stream_that_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="capacity: expected at least 1, got 0"):
        StreamPacker(capacity=0)
    with pytest.raises(ValueError, match="open_bins: expected at least 1, got 0"):
        StreamPacker(capacity=4, open_bins=0)
    packer = StreamPacker(capacity=4)
    packer.push(3)
    for length in (5, -1):
        with pytest.raises(ValueError, match=rf"sequence 1: expected 0 to the capacity 4, got {length}"):
            packer.push(length)
    with pytest.raises(ValueError, match="capacity: expected the state's 4, got 5"):
        StreamPacker(capacity=5).load_state_dict(packer.state_dict())
