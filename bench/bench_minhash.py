"""Texts to clusters of near-duplicates against datasketch, at equal parameters (word 5-grams, 128 hashes, 0.7).

The corpus is every function and class of 200 to 50,000 characters in the standard library of the Python that runs this
(FASTSFT_BENCH_DOCS caps their number). datasketch gets the first 2,000, split by a regular expression as its users do.
The gate: on those, recall of the pairs of exact Jaccard >= 0.8 is not below datasketch's by more than 3 points, and no
text without any partner above 0.5 is merged. ``extra_info`` holds documents and MB per second.
"""

from __future__ import annotations

import ast
import collections
import functools
import itertools
import os
import pathlib
import re
import sysconfig
import warnings

import datasketch
import numpy as np
import pytest

from fastsft import ops

THRESHOLD = 0.7
SAMPLE = 2000


@functools.cache
def corpus() -> list[str]:
    limit = int(os.environ.get("FASTSFT_BENCH_DOCS", "50000"))
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    texts: list[str] = []
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.parts or len(texts) >= limit:
            continue
        try:
            source = path.read_text()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):  # the library's own tests hold broken files
            continue
        lines = source.splitlines(keepends=True)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                text = "".join(lines[node.lineno - 1 : node.end_lineno])
                if 200 <= len(text) <= 50_000:
                    texts.append(text)
    return texts[:limit]


def shingles(text: str) -> set[bytes]:
    words = re.findall(r"\w+", text.lower())
    if len(words) < 5:
        return {" ".join(words).encode()}
    return {" ".join(words[i : i + 5]).encode() for i in range(len(words) - 4)}


def with_fastsft(texts: list[str]) -> np.ndarray:
    return ops.lsh_clusters(ops.minhash_signatures(texts), threshold=THRESHOLD)


def with_datasketch(texts: list[str]) -> np.ndarray:
    sketches = datasketch.MinHash.bulk([shingles(t) for t in texts], num_perm=128)
    index = datasketch.MinHashLSH(threshold=THRESHOLD, num_perm=128)
    labels = np.arange(len(texts))

    def root(i: int) -> int:
        while labels[i] != i:
            i = int(labels[i])
        return i

    for i, sketch in enumerate(sketches):
        for j in index.query(sketch):
            if sketch.jaccard(sketches[j]) >= THRESHOLD:
                a, b = sorted((root(i), root(j)))
                labels[b] = a
        index.insert(i, sketch)
    return np.array([root(i) for i in range(len(texts))])


@functools.cache
def gate() -> dict[str, float]:
    texts = corpus()[:SAMPLE]
    sets = [shingles(t) for t in texts]
    postings = collections.defaultdict(list)
    for i, members in enumerate(sets):
        for shingle in members:
            postings[shingle].append(i)
    common = collections.Counter(
        pair for holders in postings.values() if len(holders) < 200 for pair in itertools.combinations(holders, 2)
    )
    exact = {(i, j): n / (len(sets[i]) + len(sets[j]) - n) for (i, j), n in common.items()}
    wanted = [pair for pair, similarity in exact.items() if similarity >= 0.8]
    has_partner = {i for pair, similarity in exact.items() if similarity >= 0.5 for i in pair}
    recall = {}
    for name, labels in (("fastsft", with_fastsft(texts)), ("datasketch", with_datasketch(texts))):
        recall[name] = float(np.mean([labels[i] == labels[j] for i, j in wanted]))
    labels = with_fastsft(texts)
    merged = {i for i in range(len(texts)) if labels[i] != i}
    assert len(wanted) >= 20
    assert recall["fastsft"] >= recall["datasketch"] - 0.03
    assert merged <= has_partner
    return recall


CONTESTANTS = {"fastsft": (with_fastsft, None), "datasketch": (with_datasketch, SAMPLE)}


def run(benchmark, name: str, function, texts: list[str]) -> None:
    benchmark.extra_info["recall_of_pairs_above_0.8"] = gate()
    benchmark(function, texts)
    seconds = benchmark.stats["median"]
    benchmark.extra_info["documents"] = len(texts)
    benchmark.extra_info["documents_per_second"] = len(texts) / seconds
    benchmark.extra_info["MB_per_second"] = sum(len(t.encode()) for t in texts) / 1e6 / seconds
    benchmark.name = name


@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_texts_to_clusters(benchmark, contestant):
    benchmark.group = "texts to clusters"
    function, limit = CONTESTANTS[contestant]
    run(benchmark, contestant, function, corpus()[:limit])


def test_signatures(benchmark):
    benchmark.group = "parts"
    run(benchmark, "signatures", ops.minhash_signatures, corpus())


def test_signatures_of_characters(benchmark):
    benchmark.group = "parts"
    run(benchmark, "signatures of characters", lambda texts: ops.minhash_signatures(texts, unit="char"), corpus())


def test_clusters(benchmark):
    benchmark.group = "parts"
    signatures = ops.minhash_signatures(corpus())
    run(benchmark, "clusters", lambda _: ops.lsh_clusters(signatures, threshold=THRESHOLD), corpus())
