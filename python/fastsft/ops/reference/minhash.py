"""MinHash signatures and clusters."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from fastsft.ops.reference.rng import philox
from fastsft.ops.reference.words import words


def text_units(text: str, unit: str) -> list[bytes]:
    """The words, or the characters, of a text (see ``minhash.h``)."""
    if unit == "word":
        return words(text.encode())
    lowered = text.encode().lower()  # bytes.lower touches ASCII only
    return [c.encode() for c in re.sub(rb"[ \t-\r]+", b" ", lowered).strip(b" ").decode()]


def shingles(text: str, ngram: int, unit: str) -> set[tuple[bytes, ...]]:
    """The set whose Jaccard similarity the signatures estimate."""
    units = text_units(text, unit)
    width = min(ngram, len(units))
    return {tuple(units[i : i + width]) for i in range(len(units) - width + 1)} if units else set()


def fmix32(h: int) -> int:
    h = ((h ^ h >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ h >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ h >> 16


def word_state(word: bytes) -> int:
    """The 64-bit hash of a word."""
    low = 2**64 - 1
    s = 0x9E3779B97F4A7C15 * len(word) & low
    for at in range(0, len(word), 16):
        block = word[at : at + 16].ljust(16, b"\0")
        s = (s ^ int.from_bytes(block[:8], "little")) * 0xBF58476D1CE4E5B9 & low
        s ^= s >> 32
        s = (s ^ int.from_bytes(block[8:], "little")) * 0x94D049BB133111EB & low
        s ^= s >> 29
    return s


def unit_hash(unit: bytes, kind: str) -> int:
    if kind == "char":
        value = unit[0]
        for byte in unit[1:]:
            value = (value << 6 | byte & 0x3F) & 0xFFFFFFFF
        return fmix32(value)
    return word_state(unit) >> 32


def _sign(sets: Sequence[Iterable[Sequence[int]]], num_perm: int, seed: int) -> npt.NDArray[np.uint32]:
    """One row for each set of shingles, which are given as sequences of hashed units."""
    factors = np.array([philox(seed, 0x4D696E48617368, j)[:2] for j in range(num_perm)], np.uint64)
    a, b = factors[:, 0] | np.uint64(1), factors[:, 1]
    out = np.full((len(sets), num_perm), 0xFFFFFFFF, np.uint32)
    for row, members in zip(out, sets, strict=True):
        for units in members:
            total = sum(u * pow(0x1B873593, k, 2**32) for k, u in enumerate(units, 1))
            h = np.uint64(fmix32(total & 0xFFFFFFFF))
            np.minimum(row, (a * h + b).astype(np.uint32), out=row)
    return out


def minhash_signatures(
    texts: Sequence[str], *, num_perm: int = 128, ngram: int = 5, unit: str = "word", seed: int = 0
) -> npt.NDArray[np.uint32]:
    return _sign(
        [[[unit_hash(u, unit) for u in shingle] for shingle in shingles(text, ngram, unit)] for text in texts],
        num_perm,
        seed,
    )


def minhash_token_signatures(
    tokens: Sequence[int], cu_seqlens: Sequence[int], *, num_perm: int = 128, ngram: int = 5, seed: int = 0
) -> npt.NDArray[np.uint32]:
    hashed = [fmix32(t & 0xFFFFFFFF) for t in tokens]
    sets = []
    for begin, end in itertools.pairwise(cu_seqlens):
        width = min(ngram, end - begin)
        sets.append([hashed[i : i + width] for i in range(begin, end - width + 1)] if width else [])
    return _sign(sets, num_perm, seed)


def lsh_shape(num_perm: int, threshold: float) -> tuple[int, int]:
    """Integrals by the midpoint rule; the first best shape by ascending bands."""
    at = (np.arange(4000) + 0.5) / 4000
    best = (math.inf, 0, 0)
    for bands in range(1, num_perm + 1):
        for rows in range(1, num_perm // bands + 1):
            found = 1 - (1 - at**rows) ** bands
            error = float(np.where(at < threshold, found, 1 - found).mean()) / 2
            best = min(best, (error, bands, rows))
    return best[1], best[2]


def lsh_keys(signatures: npt.NDArray[np.uint32], *, bands: int, rows: int) -> npt.NDArray[np.int64]:
    def key(columns: list[int]) -> int:
        low, h = 2**64 - 1, 0x9E3779B97F4A7C15
        for i in range(0, rows - 1, 2):
            h = (h ^ columns[i] ^ columns[i + 1] << 32) * 0xBF58476D1CE4E5B9 & low
            h ^= h >> 31
        if rows % 2:
            h = (h ^ columns[-1]) * 0x94D049BB133111EB & low
        return h ^ h >> 29

    keys = [[key(row[b * rows : (b + 1) * rows]) for row in signatures.tolist()] for b in range(bands)]
    return np.array(keys, np.uint64).reshape(bands, len(signatures)).view(np.int64)


def lsh_clusters(
    signatures: npt.NDArray[np.uint32], *, threshold: float = 0.7, bands: int | None = None, rows: int | None = None
) -> npt.NDArray[np.int64]:
    """All pairs, then connected components by repeated relabelling."""
    n, num_perm = signatures.shape
    if bands is None or rows is None:
        bands, rows = lsh_shape(num_perm, threshold)
    equal = signatures[:, None, :] == signatures[None, :, :]
    candidate = equal[:, :, : bands * rows].reshape(n, n, bands, rows).all(-1).any(-1)
    linked = (candidate & (equal.sum(-1) / num_perm >= threshold)) | np.eye(n, dtype=bool)
    labels = np.arange(n)
    for _ in range(n):
        labels = np.where(linked, labels[None, :], n).min(1, initial=n)
    return labels.astype(np.int64)
