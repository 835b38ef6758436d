"""Shared n-grams (n = 8, 10, 13) of training texts with evaluation sets, against Python sets of tuples of words.

Texts: functions and classes of the standard library's sources (FASTSFT_BENCH_DOCS caps their number; default 20,000).
References: every text field of the JSON-lines files in FASTSFT_BENCH_EVAL (separated by ":", .gz allowed); without it,
600 such functions, cut off, 30 of them from among the texts. The gate: the same pairs, n-grams and covered words.
``extra_info`` holds documents and MB per second.
"""

from __future__ import annotations

import collections
import functools
import os
import random
import sysconfig
from pathlib import Path

import orjson
import pytest
from corpus import natural
from sizes import size

from fastsft import ops
from fastsft.data.streams import open_lines
from fastsft.ops.reference.words import words

NGRAMS = (8, 10, 13)
LIMIT = int(size("DOCS", 20_000, quick=2000))
Found = dict[tuple[int, int], list[tuple[int, int]]]  # (text, reference) -> for each n, n-grams and words


@functools.cache
def corpus() -> tuple[list[str], list[str]]:
    """Texts and references."""
    files = os.environ.get("FASTSFT_BENCH_EVAL")
    found = natural(LIMIT + 570, [Path(sysconfig.get_path("stdlib"))])
    texts = found[:-570]
    if files:
        rows = [orjson.loads(line) for path in files.split(":") for line in open_lines(Path(path)) if line.strip()]
        return texts, [v for row in rows for v in row.values() if isinstance(v, str)]
    rng = random.Random(0)
    return texts, [t[:600] for t in [*found[-570:], *rng.sample(texts, 30)]]


Places = dict[tuple[bytes, ...], list[tuple[int, int]]]  # n-gram -> (reference, word)


def python_index(references: list[str]) -> list[Places]:
    levels = []
    split = [words(r.encode()) for r in references]
    for n in NGRAMS:
        places = collections.defaultdict(list)
        for r, ws in enumerate(split):
            for i in range(len(ws) - n + 1):
                places[tuple(ws[i : i + n])].append((r, i))
        levels.append(dict(places))
    return levels


def with_sets(texts: list[str], index: list[Places]) -> Found:
    """Intersections of sets; larger n only where the smallest is shared."""
    found: Found = {}
    keys = [places.keys() for places in index]
    for t, text in enumerate(texts):
        ws = words(text.encode())
        for k, (n, places) in enumerate(zip(NGRAMS, index, strict=True)):
            shared = keys[k] & {tuple(ws[i : i + n]) for i in range(len(ws) - n + 1)}
            if not shared:
                break
            at = collections.defaultdict(set)
            for gram in shared:
                for r, i in places[gram]:
                    at[r].add(i)
            for r, starts in at.items():
                row = found.setdefault((t, r), [(0, 0)] * len(NGRAMS))
                row[k] = (len(starts), len({i + j for i in starts for j in range(n)}))
    return found


def with_fastsft(texts: list[str], index: object) -> Found:
    found = ops.ngram_overlap(texts, index)
    counts = [list(zip(a, b, strict=True)) for a, b in zip(found.ngrams.tolist(), found.words.tolist(), strict=True)]
    return dict(zip(zip(found.text.tolist(), found.reference.tolist(), strict=True), counts, strict=True))


CONTESTANTS = {
    "fastsft": (with_fastsft, lambda references: ops.ngram_index(references, NGRAMS)),
    "Python sets": (with_sets, python_index),
}


@functools.cache
def gate() -> dict[str, int]:
    texts, references = corpus()
    results = [function(texts, make(references)) for function, make in CONTESTANTS.values()]
    assert results[0] == results[1]
    assert results[0]
    sharing = {n: len({t for (t, _), row in results[0].items() if row[k][0]}) for k, n in enumerate(NGRAMS)}
    return {f"texts_sharing_{n}_words": count for n, count in sharing.items()}


@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_shared_ngrams(benchmark, contestant):
    benchmark.group = "n-grams shared with evaluation sets"
    benchmark.extra_info.update(gate())
    texts, references = corpus()
    function, make = CONTESTANTS[contestant]
    index = make(references)
    benchmark.pedantic(function, (texts, index), rounds=3 if contestant != "fastsft" else 9, warmup_rounds=1)
    seconds = benchmark.stats["median"]
    benchmark.extra_info["documents_per_second"] = len(texts) / seconds
    benchmark.extra_info["MB_per_second"] = sum(len(t.encode()) for t in texts) / 1e6 / seconds


@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_index(benchmark, contestant):
    benchmark.group = "index of evaluation sets"
    benchmark(CONTESTANTS[contestant][1], corpus()[1])
