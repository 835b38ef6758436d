"""Best-fit packing against the same algorithm in plain Python (a sorted list of open bins, searched by bisection).

Lengths are log-normal, clipped to the capacity. The gate: both fill the same bins. ``extra_info`` holds sequences per
second and the share of the bins' room that is filled.
"""

from __future__ import annotations

import bisect

import numpy as np
import pytest

from fastsft import ops

CAPACITIES = (2048, 8192, 32_768)


def lengths_of(count: int, capacity: int) -> np.ndarray:
    drawn = np.random.default_rng(0).lognormal(6.0, 1.0, count).astype(np.int64) + 1
    return np.minimum(drawn, capacity)


def fastsft(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    return [bin.tolist() for bin in ops.pack_sequences(lengths, capacity=capacity)]


def python_bisect(lengths: np.ndarray, capacity: int) -> list[list[int]]:
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


CONTESTANTS = {
    "fastsft": lambda lengths, capacity: ops.pack_sequences(lengths, capacity=capacity),
    "python bisect": python_bisect,
}


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_pack(benchmark, capacity, contestant):
    count = 100_000
    lengths = lengths_of(count, capacity)
    gate = lengths[:5000]
    assert fastsft(gate, capacity) == python_bisect(gate, capacity)
    benchmark.group = f"pack_sequences {count} lengths, capacity {capacity}"
    packs = benchmark(CONTESTANTS[contestant], lengths, capacity)
    benchmark.extra_info["sequences_per_second"] = count / benchmark.stats["median"]
    benchmark.extra_info["fill"] = float(lengths.sum()) / (len(packs) * capacity)
