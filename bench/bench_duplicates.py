"""Texts to clusters of near-duplicates, with exact verification and without."""

from __future__ import annotations

import functools
import os

import pytest
from corpus import natural

from fastsft import ops


@functools.cache
def texts() -> list[str]:
    return natural(int(os.environ.get("FASTSFT_BENCH_DOCS", "50000")))


@pytest.mark.parametrize("verify", [True, False])
def test_near_duplicates(benchmark, verify: bool):
    benchmark.group = "texts to clusters, exact similarities"
    benchmark(ops.near_duplicates, texts(), verify=verify)
    benchmark.extra_info["documents_per_second"] = len(texts()) / benchmark.stats["median"]
