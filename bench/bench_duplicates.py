"""Texts to clusters of near-duplicates against named rivals, at equal parameters: word 5-grams, 128 hashes, 16 bands of
8, similarity 0.7; all on one thread, in seconds of processor time. Besides, ours on one and two threads, in seconds of
wall time.

The corpus is FASTSFT_BENCH_DOCS (20,000) definitions of the installed Python sources, or the texts of a JSONL file,
FASTSFT_BENCH_DATA. Each rival gets a list of str and splits it as its users do: datasketch and rensa by a regular
expression, gaoya by its own analyser. Those not installed are left out.

The gate, on the corpus and on controlled mutants, against all pairs of exact similarity >= 0.7 by a product of sparse
matrices: no text in one of our clusters without a true partner there, and of the pairs at least as many together as
datasketch finds, within two standard errors of a share. ``extra_info`` has both figures for every contestant:
``recall`` of the pairs, and ``precision``, the share of the texts in clusters with a true partner in the same one.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from corpus import documents, mutants
from sizes import size
from sparse_join import sparse_join

from fastsft import _C, ops
from fastsft.ops.reference.words import words

THRESHOLD, HASHES, BANDS, ROWS, NGRAM = 0.7, 128, 16, 8, 5
Labels = npt.NDArray[np.int64]

os.environ.setdefault("RAYON_NUM_THREADS", "1")  # rensa and gaoya


@functools.cache
def corpus() -> list[str]:
    return documents(int(size("DOCS", 20_000, quick=2000)))


@functools.cache
def mutated() -> list[str]:
    """A tenth as many pairs of a text and its mutant as there are texts."""
    return mutants(list(dict.fromkeys(corpus()))[: len(corpus()) // 10])


def shingles(text: str) -> set[bytes]:
    found = words(text.encode())
    return {b" ".join(found[i : i + NGRAM]) for i in range(max(len(found) - NGRAM + 1, 1))} if found else set()


def joined(count: int, pairs: Iterator[tuple[int, int]]) -> Labels:
    labels = list(range(count))

    def root(i: int) -> int:
        while labels[i] != i:
            labels[i] = labels[labels[i]]
            i = labels[i]
        return i

    for i, j in pairs:
        low, high = sorted((root(i), root(j)))
        labels[high] = low
    return np.array([root(i) for i in range(count)])


def with_fastsft(texts: Any, **options: Any) -> Labels:
    options = {"threshold": THRESHOLD, "num_perm": HASHES, "ngram": NGRAM, "bands": BANDS, "rows": ROWS, **options}
    return ops.near_duplicates(texts, **options)


def with_candidates(texts: list[str]) -> Labels:
    return with_fastsft(texts, verify=False)


def with_datasketch(texts: list[str]) -> Labels:
    import datasketch

    sketches = datasketch.MinHash.bulk([shingles(t) for t in texts], num_perm=HASHES)
    index = datasketch.MinHashLSH(num_perm=HASHES, params=(BANDS, ROWS))

    def pairs() -> Iterator[tuple[int, int]]:
        for i, sketch in enumerate(sketches):
            yield from ((i, j) for j in index.query(sketch) if sketch.jaccard(sketches[j]) >= THRESHOLD)
            index.insert(i, sketch)

    return joined(len(texts), pairs())


def with_rensa(texts: list[str]) -> Labels:
    import rensa

    sketches = rensa.RMinHash.from_token_sets([list(shingles(t)) for t in texts], HASHES, 42)
    index = rensa.RMinHashLSH(THRESHOLD, HASHES, BANDS)

    def pairs() -> Iterator[tuple[int, int]]:
        for i, sketch in enumerate(sketches):
            yield from ((i, j) for j in index.query(sketch) if sketch.jaccard(sketches[j]) >= THRESHOLD)
            index.insert(i, sketch)

    return joined(len(texts), pairs())


def with_gaoya(texts: list[str]) -> Labels:
    from gaoya.minhash import MinHashStringIndex

    index = MinHashStringIndex(hash_size=32, jaccard_threshold=THRESHOLD, num_bands=BANDS, band_size=ROWS,
                               num_hashes=HASHES, analyzer="word", lowercase=True,
                               ngram_range=(NGRAM, NGRAM))  # fmt: skip
    for i, text in enumerate(texts):
        index.insert_document(i, text)
    return joined(len(texts), ((i, j) for i, text in enumerate(texts) for j in index.query(text)))


CONTESTANTS: dict[str, tuple[str | None, Callable[[list[str]], Labels]]] = {  # the package it needs
    "fastsft": (None, with_fastsft),
    "fastsft, candidates unverified": (None, with_candidates),
    "datasketch": ("datasketch", with_datasketch),
    "rensa, verified by estimate": ("rensa", with_rensa),
    "gaoya": ("gaoya", with_gaoya),
}


def installed(name: str) -> bool:
    package = CONTESTANTS[name][0]
    return package is None or importlib.util.find_spec(package) is not None


@functools.cache
def truth(texts: Callable[[], list[str]]) -> npt.NDArray[np.int64]:
    return sparse_join([shingles(t) for t in texts()], THRESHOLD)[0]


@functools.cache
def quality(name: str, texts: Callable[[], list[str]]) -> tuple[float, float]:
    """Recall and precision."""
    labels = CONTESTANTS[name][1](texts())
    i, j = truth(texts).T
    together = labels[i] == labels[j]
    sizes = np.bincount(labels, minlength=len(labels))
    partnered = np.zeros(len(labels), bool)
    partnered[i[together]] = partnered[j[together]] = True
    return float(together.mean()), float(partnered[sizes[labels] > 1].mean())


@functools.cache
def gate() -> None:
    for texts in (corpus, mutated):
        assert len(truth(texts)) > 20
        recall, precision = quality("fastsft", texts)
        assert precision == 1.0
        if installed("datasketch"):
            theirs = quality("datasketch", texts)[0]
            assert recall >= theirs - 2 * (theirs * (1 - theirs) / len(truth(texts))) ** 0.5


def joined_texts(texts: list[str]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    parts = [text.encode() for text in texts]
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    return np.frombuffer(b"".join(parts), np.uint8), offsets


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = _C.num_threads()
    _C.set_num_threads(1)
    yield
    _C.set_num_threads(before)


@pytest.mark.benchmark(group="texts to clusters", timer=time.process_time)
@pytest.mark.parametrize("contestant", [name for name in CONTESTANTS if installed(name)])
def test_texts_to_clusters(benchmark, contestant: str):
    gate()
    function = CONTESTANTS[contestant][1]
    ours = contestant.startswith("fastsft")
    benchmark.pedantic(function, args=(corpus(),), rounds=9 if ours else 1, warmup_rounds=1 if ours else 0)
    benchmark.extra_info["documents"] = len(corpus())
    benchmark.extra_info["documents_per_second"] = len(corpus()) / benchmark.stats["median"]
    benchmark.extra_info["MB_per_second"] = sum(len(t.encode()) for t in corpus()) / 1e6 / benchmark.stats["median"]
    for name, texts in (("", corpus), ("_of_mutants", mutated)):
        recall, precision = quality(contestant, texts)
        benchmark.extra_info |= {f"recall{name}": recall, f"precision{name}": precision}


@pytest.mark.benchmark(group="texts to clusters, wall time of 1 and 2 threads")
@pytest.mark.parametrize("threads", [1, 2])
def test_threads(benchmark, threads: int):
    arena = joined_texts(corpus())
    _C.set_num_threads(threads)
    benchmark.name = f"fastsft, {threads} threads"
    benchmark.pedantic(with_fastsft, args=(arena,), rounds=15, warmup_rounds=2)
