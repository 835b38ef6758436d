"""Shared n-grams by Python sets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

Words = list[bytes]


class Index(NamedTuple):
    references: list[bytes]
    ngrams: list[int]


def ngram_index(references: Sequence[str], ngrams: Sequence[int] = (8, 10, 13)) -> Index:
    return Index([r.encode() for r in references], sorted(ngrams))


def ngram_overlap(texts: Sequence[str], index: Index) -> list[tuple[int, int, list[tuple[int, int, int, int]]]]:
    """(text, reference, for each n: n-grams, words, begin and end of the passage)."""
    rows = []
    for t, text in enumerate(texts):
        words = [m.group() for m in _words(text.encode())]
        have = {n: set(_ngrams(words, n)) for n in index.ngrams}
        for r, reference in enumerate(index.references):
            shared = [_shared(reference, n, have[n]) for n in index.ngrams]
            if shared[0][0]:
                rows.append((t, r, shared))
    return rows


def _words(data: bytes) -> list[re.Match[bytes]]:
    return list(re.finditer(rb"[a-z0-9_\x80-\xff]+", data.lower()))  # bytes.lower touches ASCII only


def _ngrams(words: Words, n: int) -> list[tuple[bytes, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _shared(reference: bytes, n: int, have: set[tuple[bytes, ...]]) -> tuple[int, int, int, int]:
    spans = [m.span() for m in _words(reference)]
    found = [gram in have for gram in _ngrams([reference.lower()[b:e] for b, e in spans], n)]
    covered = {i + k for i, yes in enumerate(found) if yes for k in range(n)}
    runs = [
        (j - i, -i)
        for i in range(len(found))
        for j in range(i + 1, len(found) + 1)
        if all(found[i:j])
    ]  # fmt: skip
    if not runs:
        return 0, 0, 0, 0
    length, first = max(runs)
    return sum(found), len(covered), spans[-first][0], spans[-first + length + n - 2][1]
