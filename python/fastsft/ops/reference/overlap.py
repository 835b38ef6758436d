"""Shared n-grams by Python sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastsft.ops.reference.words import word_spans, words

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
        text_words = words(text.encode())
        have = {n: set(_ngrams(text_words, n)) for n in index.ngrams}
        for r, reference in enumerate(index.references):
            shared = [_shared(reference, n, have[n]) for n in index.ngrams]
            if shared[0][0]:
                rows.append((t, r, shared))
    return rows


def _ngrams(words: Words, n: int) -> list[tuple[bytes, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _shared(reference: bytes, n: int, have: set[tuple[bytes, ...]]) -> tuple[int, int, int, int]:
    spans = word_spans(reference)
    found = [gram in have for gram in _ngrams(words(reference), n)]
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
