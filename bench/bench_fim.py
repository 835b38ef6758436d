"""Fill-in-the-middle on packed tokens against numpy, one document at a time (how most pipelines do it).

20,000 documents with log-normal lengths, 6 M tokens. The gate: the numpy contestant, given the cuts that the native op
chose, builds the same tokens. ``extra_info`` holds documents and tokens per second and, as the machine's limit, the
share of the rate at which as many bytes are copied between warm buffers; the op pays for fresh pages besides.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fastsft import ops
from fastsft.ops.fim import FimResult

SENTINELS = (50_001, 50_002, 50_003)
DOCUMENTS = 20_000


def documents() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5.3, 0.9, DOCUMENTS).astype(np.int64) + 1, 8192)
    cu = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return rng.integers(0, 50_000, int(cu[-1])).astype(np.int32), cu


def rearrange(row: np.ndarray, begin: int, end: int, spm: bool) -> np.ndarray:
    prefix, middle, suffix = row[:begin], row[begin:end], row[end:]
    pre, suf, mid = (np.array([s], row.dtype) for s in SENTINELS)
    if spm:
        return np.concatenate([pre, suf, suffix, mid, prefix, middle])
    return np.concatenate([pre, prefix, suf, suffix, mid, middle])


def with_numpy(tokens: np.ndarray, cu: np.ndarray, rate: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    rows = []
    for begin, end in itertools.pairwise(cu):
        row = tokens[begin:end]
        if rng.random() < rate:
            low, high = np.sort(rng.integers(0, len(row), 2, endpoint=True))
            row = rearrange(row, low, high, rng.random() < 0.5)
        rows.append(row)
    return np.concatenate(rows), np.cumsum([0, *map(len, rows)])


def native(tokens: np.ndarray, cu: np.ndarray, rate: float) -> FimResult:
    return ops.fim_permute(tokens, cu, sentinels=SENTINELS, seed=0, rate=rate)


def gate(tokens: np.ndarray, cu: np.ndarray) -> None:
    got = native(tokens, cu, 0.5)
    for b in range(300):
        row = tokens[cu[b] : cu[b + 1]]
        out = got.tokens[got.cu_seqlens[b] : got.cu_seqlens[b + 1]]
        if got.mode[b]:
            after_mid = int(np.flatnonzero(out == SENTINELS[2])[0])
            after_suf = int(np.flatnonzero(out == SENTINELS[1])[0])
            end = len(row) - (after_mid - after_suf - 1)
            # In SPM prefix and middle are joined, so that any begin builds the same row.
            row = rearrange(row, after_suf - 1 if got.mode[b] == 1 else 0, end, got.mode[b] == 2)
        assert np.array_equal(out, row)


@pytest.mark.parametrize("contestant", ["fastsft", "numpy"])
@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_fim(benchmark, limits, rate, contestant):
    tokens, cu = documents()
    gate(tokens, cu)
    benchmark.group = f"fim_permute {DOCUMENTS} documents, rate {rate}"
    benchmark({"fastsft": native, "numpy": with_numpy}[contestant], tokens, cu, rate)
    seconds = benchmark.stats["median"]
    moved = len(tokens) * (4 + 4 + 8)  # read, written, and the source index, which numpy does not build
    benchmark.extra_info["documents_per_second"] = DOCUMENTS / seconds
    benchmark.extra_info["tokens_per_second"] = len(tokens) / seconds
    if contestant == "fastsft":
        limits.share_bytes(benchmark, copied=moved)
