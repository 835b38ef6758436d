"""Clusters of near-duplicates by Python sets."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from fastsft.ops.reference.minhash import lsh_keys, lsh_shape, minhash_signatures, shingles, word_state

Shingle = tuple[bytes, ...]
Set = frozenset[Shingle]
MASK = 2**64 - 1


def near_duplicates(
    texts: Sequence[str],
    *,
    threshold: float = 0.7,
    num_perm: int = 128,
    ngram: int = 5,
    unit: str = "word",
    bands: int | None = None,
    rows: int | None = None,
    verify: bool = True,
    max_cluster: int | None = None,
    seed: int = 0,
    mode: str = "lsh",
) -> npt.NDArray[np.int64]:
    if mode == "all_pairs":
        return _clusters(texts, [range(len(texts))], threshold, ngram=ngram, unit=unit, max_cluster=max_cluster)
    if bands is None or rows is None:
        bands, rows = lsh_shape(num_perm, threshold)
    signatures = minhash_signatures(texts, num_perm=num_perm, ngram=ngram, unit=unit, seed=seed)
    buckets: dict[tuple[int, int], list[int]] = {}
    for band, keys in enumerate(lsh_keys(signatures, bands=bands, rows=rows)):
        for i, key in enumerate(keys.tolist()):
            buckets.setdefault((band, key), []).append(i)
    return _clusters(
        texts, buckets.values(), threshold if verify else 0.0, ngram=ngram, unit=unit, max_cluster=max_cluster
    )


def similar_pairs(
    texts: Sequence[str], *, threshold: float = 0.7, ngram: int = 5, unit: str = "word"
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    sets = [frozenset(shingles(t, ngram, unit)) for t in texts]
    every = [(i, j, similarity(sets[i], sets[j])) for i, j in itertools.combinations(range(len(texts)), 2)]
    found = [pair for pair in every if pair[2] >= threshold]
    return np.array([p[:2] for p in found], np.int64).reshape(-1, 2), np.array([p[2] for p in found], np.float64)


def link_similar(
    texts: Sequence[str],
    members: npt.NDArray[np.int64],
    bucket_offsets: npt.NDArray[np.int64],
    parent: npt.NDArray[np.int64],
    *,
    threshold: float = 0.7,
    ngram: int = 5,
    unit: str = "word",
    rows: npt.NDArray[np.int64] | None = None,
    max_cluster: int | None = None,
) -> None:
    buckets = [members[i:j].tolist() for i, j in itertools.pairwise(bucket_offsets.tolist())]
    labels = _clusters(texts, buckets, threshold, ngram=ngram, unit=unit, max_cluster=max_cluster)
    place = np.arange(len(texts)) if rows is None else rows

    def root(row: int) -> int:
        while parent[row] != row:
            row = int(parent[row])
        return row

    for i, label in enumerate(labels):
        low, high = sorted((root(int(place[i])), root(int(place[label]))))
        parent[high] = low


def similarity(x: Set, y: Set) -> float:
    return len(x & y) / len(x | y) if x or y else 1.0


def _clusters(
    texts: Sequence[str],
    buckets: Iterable[Sequence[int]],
    threshold: float,
    *,
    ngram: int,
    unit: str,
    max_cluster: int | None,
) -> npt.NDArray[np.int64]:
    sets = [frozenset(shingles(t, ngram, unit)) for t in texts]
    pairs = {frozenset((sets[i], sets[j])) for b in buckets for i, j in itertools.combinations(b, 2)}
    links = [(similarity(*pair), *pair) for pair in map(tuple, pairs) if len(pair) == 2]
    links = [link for link in links if link[0] >= threshold]
    cluster = _linked(links, sets)
    if max_cluster is not None:
        large = {s for s, members in cluster.items() if len(members) > max_cluster}
        cluster |= _stars(large, links, max_cluster, unit)
    first = {
        members: min(i for i, s in enumerate(sets) if s in members) for members in map(frozenset, cluster.values())
    }
    return np.array([first[frozenset(cluster[s])] for s in sets], np.int64)


def _linked(links: list[tuple[float, Set, Set]], sets: list[Set]) -> dict[Set, list[Set]]:
    """The cluster of each set, by merging lists."""
    cluster = {s: [s] for s in sets}
    for _, x, y in links:
        if cluster[x] is not cluster[y]:
            cluster[x] += cluster[y]
            for s in cluster[y]:
                cluster[s] = cluster[x]
    return cluster


def _stars(sets: set[Set], links: list[tuple[float, Set, Set]], limit: int, unit: str) -> dict[Set, list[Set]]:
    """The star of each set; its first member is the centre."""
    linked = {frozenset((x, y)): value for value, x, y in links}
    stars: list[list[Set]] = []
    for s in sorted(sets, key=lambda members: _fingerprint(members, unit)):
        room = [(linked[frozenset((s, star[0]))], star) for star in stars
                if len(star) < limit and frozenset((s, star[0])) in linked]  # fmt: skip
        if room:
            max(room, key=lambda found: found[0])[1].append(s)  # max: the first of equal ones
        else:
            stars.append([s])
    return {s: star for star in stars for s in star}


def _fingerprint(members: Set, unit: str) -> tuple[int, int, int]:
    hashes = [_shingle_hash(s, unit) for s in members]
    return sum(hashes) & MASK, sum((h >> 32) * (h & 0xFFFFFFFF) for h in hashes) & MASK, len(hashes)


def _shingle_hash(shingle: Shingle, unit: str) -> int:
    total = 0
    for k, u in enumerate(shingle, 1):
        total += (word_state(u) if unit == "word" else _char_hash(u)) * pow(0xD6E8FEB86659FD93, k, 2**64)
    h = _fmix64(total & MASK)
    return h or 1


def _char_hash(char: bytes) -> int:
    value = char[0]
    for byte in char[1:]:
        value = value << 6 | byte & 0x3F
    return _fmix64(value)


def _fmix64(h: int) -> int:
    h = (h ^ h >> 33) * 0xFF51AFD7ED558CCD & MASK
    h = (h ^ h >> 33) * 0xC4CEB9FE1A85EC53 & MASK
    return h ^ h >> 33
