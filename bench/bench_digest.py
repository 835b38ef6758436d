"""128-bit digests of texts against hashlib's fastest (blake2b of 16 bytes). ``extra_info`` holds GB per second.

The gate: both tell the same texts apart.
"""

from __future__ import annotations

import hashlib

import pytest
from bench_minhash import corpus

from fastsft import ops


def with_fastsft(texts: list[str]) -> list[bytes]:
    return [d.tobytes() for d in ops.text_digests(texts)]


def with_hashlib(texts: list[str]) -> list[bytes]:
    return [hashlib.blake2b(t.encode(), digest_size=16).digest() for t in texts]


CONTESTANTS = {"fastsft": ops.text_digests, "hashlib": with_hashlib}


@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_digests(benchmark, contestant):
    texts = corpus()
    ours, theirs = with_fastsft(texts), with_hashlib(texts)
    assert len(set(zip(ours, theirs, strict=True))) == len(set(ours)) == len(set(theirs))
    benchmark.group = "digests of texts"
    benchmark(CONTESTANTS[contestant], texts)
    benchmark.extra_info["GB_per_second"] = sum(len(t.encode()) for t in texts) / 1e9 / benchmark.stats["median"]
