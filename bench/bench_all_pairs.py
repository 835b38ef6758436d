"""Every pair of similar texts against the product of sparse matrices, which is the usual way to miss none.

The gate: the same pairs, with the same similarities. FASTSFT_BENCH_DOCS texts (20,000).
"""

from __future__ import annotations

import functools
import itertools
import os
import re

import numpy as np
import numpy.typing as npt
import pytest
from corpus import natural
from scipy import sparse

from fastsft import ops

THRESHOLD = 0.7
Pairs = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]


@functools.cache
def texts() -> list[str]:
    return natural(int(os.environ.get("FASTSFT_BENCH_DOCS", "20000")))


def with_fastsft() -> Pairs:
    return ops.similar_pairs(texts(), threshold=THRESHOLD)


def with_sparse_product() -> Pairs:
    numbers: dict[str, int] = {}
    rows = []
    for text in texts():
        # the words of fastsft: ASCII case is folded, any other character is a letter
        words = re.findall(r"[a-z0-9_\x80-\U0010ffff]+", re.sub("[A-Z]", lambda m: m.group().lower(), text))
        grams = {" ".join(words[i : i + 5]) for i in range(max(len(words) - 4, 1))} if words else set()
        rows.append([numbers.setdefault(gram, len(numbers)) for gram in grams])
    ends = np.array([0, *itertools.accumulate(map(len, rows))])
    columns = np.fromiter(itertools.chain.from_iterable(rows), np.int32, ends[-1])
    matrix = sparse.csr_matrix((np.ones(len(columns), np.int32), columns, ends), (len(rows), len(numbers)))
    common = sparse.triu(matrix @ matrix.T, k=1, format="coo")
    sizes = np.diff(ends)
    similarity = common.data / (sizes[common.row] + sizes[common.col] - common.data)
    kept = similarity >= THRESHOLD
    order = np.lexsort((common.col[kept], common.row[kept]))
    pairs = np.stack([common.row[kept], common.col[kept]], 1)[order].astype(np.int64)
    return pairs, similarity[kept][order]


CONTESTANTS = {"fastsft": with_fastsft, "sparse product": with_sparse_product}


@functools.cache
def gate() -> int:
    """The number of pairs."""
    ours, theirs = with_fastsft(), with_sparse_product()
    assert all(np.array_equal(x, y) for x, y in zip(ours, theirs, strict=True))
    return len(ours[0])


@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_all_pairs(benchmark, contestant: str):
    benchmark.group = "all pairs of similarity 0.7"
    benchmark.extra_info["documents"] = len(texts())
    benchmark.extra_info["pairs"] = gate()
    benchmark.pedantic(CONTESTANTS[contestant], rounds=7 if contestant == "fastsft" else 1, warmup_rounds=1)
