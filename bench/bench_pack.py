"""Best-fit packing against TRL's ``bfd`` and against the same algorithm in plain Python (a sorted list of open bins).

Two rows. Lengths to bins: TRL's inner function gets them as a table of one byte per token, so that what it moves hardly
counts. A whole set to packed rows: ``pack_dataset`` on a table of int32 ids and float32 weights, as one batch, for its
default of 1,000 rows at a time fills less (``fill, 1,000 at a time``); ours from a store to every batch of an epoch,
with position ids, shifted targets and their weights.

Lengths are log-normal or those of two public sets (``shapes.py``), clipped to the capacity; FASTSFT_BENCH_DATA names a
JSONL file to take them from instead, four characters to a token. The gate: no rival needs fewer bins.
TRL is a rival where it can be imported (it needs datasets, pyarrow and accelerate).
"""

from __future__ import annotations

import bisect
import functools
import importlib.util
import os
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import shapes

from fastsft import ops
from fastsft.data.loader import PackedLoader
from fastsft.data.packing import StreamPacker
from fastsft.data.records import Problems, read_records
from fastsft.data.store import SampleStore

COUNT = 100_000
DOCUMENTS = 20_000
CAPACITIES = (2048, 8192, 32_768)
FILE = os.environ.get("FASTSFT_BENCH_DATA")
DISTRIBUTIONS = ("file",) if FILE else ("log-normal", "gsm8k", "nl2bash")
HAS_TRL = all(importlib.util.find_spec(name) for name in ("trl", "datasets", "pyarrow", "accelerate"))

Lengths = npt.NDArray[np.int64]


@functools.cache
def lengths_of(distribution: str, count: int, capacity: int) -> Lengths:
    rng = np.random.default_rng(0)
    if distribution == "log-normal":
        drawn = rng.lognormal(6.0, 1.0, count).astype(np.int64) + 1
    elif distribution == "file":
        found = [len(r.text()) // 4 + 1 for r in read_records([str(FILE)], Problems("skip"))]
        drawn = rng.choice(np.array(found), count)
    else:
        deciles = {"gsm8k": shapes.GSM8K_DECILES, "nl2bash": shapes.NL2BASH_DECILES}[distribution]
        drawn = np.interp(rng.uniform(0, len(deciles) - 1, count), np.arange(len(deciles)), deciles).astype(np.int64)
    return np.minimum(drawn, capacity)


def python_bisect(lengths: Lengths, capacity: int) -> list[list[int]]:
    values = lengths.tolist()
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # (room, bin), ascending
    for i in sorted(range(len(values)), key=lambda i: -values[i]):
        at = bisect.bisect_left(open_bins, (values[i], -1))
        if at == len(open_bins):
            room, b = capacity, len(bins)
            bins.append([])
        else:
            room, b = open_bins.pop(at)
        bins[b].append(i)
        bisect.insort(open_bins, (room - values[i], b))
    return bins


@functools.cache
def table(distribution: str, count: int, capacity: int, bytes_only: bool) -> Any:
    """The set as TRL takes it: ids (and weights) whose documents have these lengths."""
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(lengths_of(distribution, count, capacity))]).astype(np.int32)
    kinds = [("input_ids", np.int8)] if bytes_only else [("input_ids", np.int32), ("weights", np.float32)]
    return pa.table({n: pa.ListArray.from_arrays(offsets, np.ones(offsets[-1], kind)) for n, kind in kinds})


BINS = {
    "fastsft": lambda lengths, capacity: ops.pack_sequences(lengths, capacity=capacity),
    "fastsft stream": lambda lengths, capacity: list(StreamPacker(capacity=capacity).pack(lengths.tolist())),
    "python bisect": python_bisect,
    **({"trl bfd": None} if HAS_TRL else {}),
}


@pytest.mark.parametrize("contestant", BINS)
@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_pack(benchmark: Any, distribution: str, capacity: int, contestant: str) -> None:
    lengths = lengths_of(distribution, COUNT, capacity)
    benchmark.group = f"pack_sequences {COUNT} lengths, {distribution}, capacity {capacity}"
    if contestant == "trl bfd":
        from trl.data_utils import _pack_bfd

        packs = benchmark.pedantic(_pack_bfd, (table(distribution, COUNT, capacity, True), capacity), rounds=3)
    else:
        packs = benchmark(BINS[contestant], lengths, capacity)
    assert len(ops.pack_sequences(lengths, capacity=capacity)) <= len(packs)
    if contestant == "python bisect":
        assert [b.tolist() for b in ops.pack_sequences(lengths, capacity=capacity)] == packs
    benchmark.extra_info["sequences_per_second"] = COUNT / benchmark.stats["median"]
    benchmark.extra_info["fill"] = float(lengths.sum()) / (len(packs) * capacity)


def epoch_of(store: SampleStore, capacity: int) -> int:
    loader = PackedLoader(store, capacity=capacity, seed=0)
    for i in range(loader.num_batches(0)):
        loader.batch(0, i)
    return loader.num_batches(0)


@pytest.mark.parametrize("contestant", ["fastsft", *(["trl bfd"] if HAS_TRL else [])])
@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_pack_set(benchmark: Any, distribution: str, capacity: int, contestant: str) -> None:
    lengths = lengths_of(distribution, DOCUMENTS, capacity)
    benchmark.group = f"packed rows of {DOCUMENTS} documents, {distribution}, capacity {capacity}"
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if contestant == "fastsft":
        ones = np.ones(int(offsets[-1]), np.float32)
        store = SampleStore(
            ones.astype(np.int32),
            ones,
            ones.astype(np.uint8),
            offsets,
            np.zeros(len(lengths), np.int32),
            [""] * len(lengths),
            [()] * len(lengths),
            {},
        )
        rows = benchmark(epoch_of, store, capacity)
    else:
        import datasets
        from trl import pack_dataset

        datasets.disable_progress_bars()
        rows_of = datasets.Dataset(table(distribution, DOCUMENTS, capacity, False))

        def packed(at_a_time: int | None) -> int:
            options = {"batch_size": at_a_time, "load_from_cache_file": False}
            return len(pack_dataset(rows_of, capacity, map_kwargs=options))

        rows = benchmark.pedantic(packed, (None,), rounds=3)
        benchmark.extra_info["fill, 1,000 at a time"] = float(offsets[-1]) / (packed(1000) * capacity)
    benchmark.extra_info["tokens_per_second"] = float(offsets[-1]) / benchmark.stats["median"]
    benchmark.extra_info["fill"] = float(offsets[-1]) / (rows * capacity)
