"""Every pair of similar texts against the product of sparse matrices, from the same list of str, on one thread.

The gate: the same pairs, with the same similarities. The corpus is bench_duplicates'.
"""

from __future__ import annotations

import functools
import time

import numpy as np
import pytest
from bench_duplicates import THRESHOLD, corpus, one_thread, shingles  # noqa: F401  (a fixture)
from sparse_join import sparse_join

from fastsft import ops


def with_fastsft():
    return ops.similar_pairs(corpus(), threshold=THRESHOLD)


def with_sparse_product():
    return sparse_join([shingles(t) for t in corpus()], THRESHOLD)


CONTESTANTS = {"fastsft": with_fastsft, "sparse product": with_sparse_product}


@functools.cache
def gate() -> int:
    """The number of pairs."""
    ours, theirs = with_fastsft(), with_sparse_product()
    assert all(np.array_equal(x, y) for x, y in zip(ours, theirs, strict=True))
    return len(ours[0])


@pytest.mark.benchmark(group="all pairs of similarity 0.7", timer=time.process_time)
@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_all_pairs(benchmark, contestant: str):
    benchmark.extra_info |= {"documents": len(corpus()), "pairs": gate()}
    ours = contestant == "fastsft"
    benchmark.pedantic(CONTESTANTS[contestant], rounds=7 if ours else 1, warmup_rounds=1 if ours else 0)
