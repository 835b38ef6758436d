"""MinHash signatures alone, of sets of hashes, against rensa: 128 hash functions, one thread, processor time.

The sets are the distinct word 5-grams of bench_duplicates' corpus, as one flat array of what each takes: 32-bit hashes
for fastsft, 64-bit ones for rensa. The gate: over pairs of similar texts our estimates have the error that theory gives
them. ``extra_info`` holds millions of hashes per second.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import time
import zlib

import numpy as np
import pytest
from bench_duplicates import HASHES, corpus, mutated, one_thread, shingles  # noqa: F401  (a fixture)
from sparse_join import sparse_join

from fastsft import _C, ops


def flat(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """64-bit hashes of the shingles, good in their upper half, and where each text's begin."""
    sets = [shingles(t) for t in texts]
    ends = np.array([0, *itertools.accumulate(map(len, sets))], np.int64)
    halves = np.fromiter((zlib.crc32(x) << 32 | zlib.adler32(x) for s in sets for x in s), np.uint64, ends[-1])
    return halves, ends


def with_fastsft(hashes: np.ndarray, ends: np.ndarray) -> np.ndarray:
    return ops.minhash_token_signatures(hashes, ends, num_perm=HASHES, ngram=1)


def with_avx2(hashes: np.ndarray, ends: np.ndarray) -> np.ndarray:
    before = _C.active_isa()
    _C.set_isa("avx2")
    try:
        return with_fastsft(hashes, ends)
    finally:
        _C.set_isa(before)


def with_rensa(hashes: np.ndarray, ends: np.ndarray):
    import rensa

    return rensa.RMinHash.digest_matrix_from_flat_token_hashes(hashes, ends, HASHES, 42)


CONTESTANTS = {"fastsft": (with_fastsft, 32), "fastsft, AVX2": (with_avx2, 32)}
if importlib.util.find_spec("rensa") is not None:
    CONTESTANTS["rensa"] = (with_rensa, 64)


@functools.cache
def inputs(texts, bits: int) -> tuple[np.ndarray, np.ndarray]:
    hashes, ends = flat(texts())
    return hashes if bits == 64 else (hashes >> np.uint64(32)).astype(np.uint32).view(np.int32), ends


@functools.cache
def gate() -> float:
    """Root mean square error over that of theory, on the mutants."""
    pairs, exact = sparse_join([shingles(t) for t in mutated()], 0.3)
    signatures = with_fastsft(*inputs(mutated, 32))
    error = (signatures[pairs[:, 0]] == signatures[pairs[:, 1]]).mean(1) - exact
    ratio = float(np.sqrt((error**2).mean() / (exact * (1 - exact) / HASHES).mean()))
    assert 0.9 < ratio < 1.1
    return ratio


@pytest.mark.benchmark(group="signatures of hashes", timer=time.process_time)
@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_signatures(benchmark, contestant: str):
    benchmark.extra_info["error_over_theory"] = gate()
    function, bits = CONTESTANTS[contestant]
    hashes, ends = inputs(corpus, bits)
    benchmark.pedantic(function, args=(hashes, ends), rounds=15, warmup_rounds=1)
    benchmark.extra_info["Mhashes_per_second"] = len(hashes) / 1e6 / benchmark.stats["median"]
