"""Second stage of deduplication: digests and band keys to clusters, reading again only the rows that are candidates.

Exact duplicates have equal digests; of each only the first goes on. Rows with the same key in a band are candidates,
whose texts are read again, in one pass over the files, and compared exactly (:func:`fastsft.ops.link_similar`). The
clusters are those of :func:`fastsft.ops.near_duplicates` on all texts at once: what is held in memory at a time, and in
which order, changes nothing.

Memory, in bytes a row: 8 for the first of equal rows, 8 for the clusters; besides these, parts sized by ``memory``, and
the texts of the largest cluster where clusters are limited.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fastsft.data.candidates import CandidateTexts, compared_texts
from fastsft.data.scan import SketchOptions
from fastsft.data.shards import Shards
from fastsft.data.sources import Source
from fastsft.ops import link_similar
from fastsft.progress import Progress

Ints = npt.NDArray[np.int64]
_ROW_BYTES = 160  # what sorting a row's hash takes at its peak


@dataclass(frozen=True)
class LinkOptions:
    """``verify``: candidates by their texts, by the share of equal columns of their signatures, or not at all."""

    verify: Literal["exact", "signature"] = "exact"
    max_cluster: int | None = None


@dataclass(frozen=True)
class Buckets:
    """Bucket b holds the rows ``members[offsets[b] : offsets[b + 1]]``, candidates of each other."""

    members: Ints
    offsets: Ints

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def select(self, chosen: npt.NDArray[np.bool_]) -> Buckets:
        sizes = np.diff(self.offsets)
        return Buckets(self.members[np.repeat(chosen, sizes)], np.cumsum([0, *sizes[chosen]]))


def equal_rows(shards: Shards, *, memory: int) -> Ints:
    """int64 [n]: for each row, the first with the same digest."""
    n = len(shards)
    first = np.arange(n)
    for rows, digests in _parts(shards, "digests", None, n, memory // _ROW_BYTES):
        order = np.argsort(digests[:, 0])
        ordered = digests[order]
        same = ordered[1:] == ordered[:-1]
        if np.any(same[:, 0] & ~same[:, 1]):  # half of a digest in common
            order = np.lexsort((digests[:, 1], digests[:, 0]))
            ordered = digests[order]
            same = ordered[1:] == ordered[:-1]
        begins = np.flatnonzero(np.append(True, ~same.all(axis=1)))
        least = np.minimum.reduceat(rows[order], begins) if len(rows) else rows
        first[rows[order]] = np.repeat(least, np.diff(np.append(begins, len(rows))))
    return first


def band_buckets(shards: Shards, band: int, alone: npt.NDArray[np.bool_], *, since: int = 0, memory: int) -> Buckets:
    """Rows with the same key in a band, of those that are not exact duplicates of an earlier one (``alone``); only
    buckets with a row from ``since`` on."""
    members, sizes = [], []
    for rows, keys in _parts(shards, "keys", band, len(shards), memory // _ROW_BYTES):
        mine = alone[rows]
        rows, keys = rows[mine], keys[mine]
        order = np.argsort(keys)
        ordered = keys[order]
        begins = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])) if len(rows) else np.empty(0, np.int64)
        counts = np.diff(np.append(begins, len(rows)))
        members.append(rows[order][np.repeat(counts > 1, counts)])
        sizes.append(counts[counts > 1])
    found = Buckets(np.concatenate(members), np.cumsum(np.concatenate([[0], *sizes])))
    if since and len(found):
        found = found.select(np.maximum.reduceat(found.members, found.offsets[:-1]) >= since)
    return found


def _parts(shards: Shards, name: str, part: int | None, n: int, limit: int) -> Iterator[tuple[Ints, Any]]:
    """(rows, values) by ranges of hash values, so that equal values meet and at most about ``limit`` rows are held."""
    count = max(1, -(-n // max(limit, 1)))
    for p in range(count):
        rows, values = [], []
        for offset, shard in zip(shards.offsets, shards.shards, strict=False):
            array = shard.read(name, part)
            hashes = (array if array.ndim == 1 else array[:, 0]).view(np.uint64)
            mine = np.flatnonzero((hashes >> np.uint64(32)) % np.uint64(count) == p) if count > 1 else slice(None)
            rows.append(np.arange(len(array))[mine] + offset)
            values.append(array[mine])
        if rows:
            yield np.concatenate(rows), np.concatenate(values)


def link(
    sources: Sequence[Source],
    shards: Shards,
    options: SketchOptions,
    how: LinkOptions,
    *,
    memory: int,
    folder: Path | None = None,
    known: Ints | None = None,
    progress: Progress | None = None,
) -> tuple[Ints, Ints]:
    """(first, labels), int64 [n]: the first row of equal content, and the first row of the cluster.

    Args:
        known: labels of the first rows, from a call with these alone; only what came since is compared with others.

    Raises:
        DataError: a file changed since it was scanned.
    """
    first = equal_rows(shards, memory=memory)
    if options.mode == "exact":
        return first, first
    alone = first == np.arange(len(first))
    since = 0 if known is None else len(known)
    buckets = _Bands(shards, options.shape[0], alone, since, memory)
    candidate = np.zeros(len(first), np.bool_)
    for done, part in enumerate(buckets):
        candidate[part.members] = True
        if progress:
            progress("candidates", done + 1, len(buckets))
    rows = np.flatnonzero(candidate)
    parent = np.arange(len(first))
    if known is not None:
        parent[:since] = known
    texts, compared = compared_texts(
        sources, shards, rows, options, how.verify, memory=memory // 8, folder=folder
    )  # fmt: skip
    link_buckets(buckets, texts, parent, compared, how.max_cluster, memory=memory // 16, progress=progress)
    return first, roots(parent)[first]


def link_buckets(buckets: Sequence[Buckets], texts: CandidateTexts, parent: Ints, options: SketchOptions,
                 max_cluster: int | None, *, memory: int, progress: Progress | None = None) -> None:  # fmt: skip
    """Join the similar rows of all buckets in ``parent``."""
    if int(texts.offsets[-1]) <= memory:
        _compare(_joined(buckets), texts, parent, options, max_cluster)
        return
    for done, part in enumerate(buckets):
        for batch in _batches(_unconnected(part, parent), texts, memory):
            _compare(batch, texts, parent, options, None)
        if progress:
            progress("comparing", done + 1, len(buckets))
    if max_cluster is not None:
        limit_clusters(buckets, texts, parent, options, max_cluster)


def limit_clusters(buckets: Sequence[Buckets], texts: CandidateTexts, parent: Ints, options: SketchOptions,
                   max_cluster: int) -> None:  # fmt: skip
    """Make the components with more than ``max_cluster`` rows anew, within the limit. ``texts`` has theirs.

    Whatever the limit of memory, the texts of one such component are held at a time: which star a text joins depends on
    all before it.
    """
    found = roots(parent)
    large = oversized(parent, max_cluster)
    parts = _joined([_within(part, large[found]) for part in buckets])
    for root in np.flatnonzero(large).tolist():  # a bucket holds rows of several components, of which one counts here
        inside = found == root
        parent[inside] = np.flatnonzero(inside)
        _compare(_within(parts, inside), texts, parent, options, max_cluster)


def oversized(parent: Ints, max_cluster: int) -> npt.NDArray[np.bool_]:
    """Whether a row is the root of more than ``max_cluster`` rows."""
    return np.asarray(np.bincount(roots(parent), minlength=len(parent)) > max_cluster)


class _Bands(Sequence[Buckets]):
    """The buckets of each band, made anew when asked for where all of them would be too much."""

    def __init__(self, shards: Shards, count: int, alone: npt.NDArray[np.bool_], since: int, memory: int) -> None:
        self._shards, self._alone, self._since, self._memory = shards, alone, since, memory
        self._count = count
        self._kept: list[Buckets] | None = None
        if 16 * count * len(shards) <= memory // 4:
            self._kept = [self._make(band) for band in range(count)]

    def _make(self, band: int) -> Buckets:
        return band_buckets(self._shards, band, self._alone, since=self._since, memory=self._memory)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, band: Any) -> Any:
        if not 0 <= band < self._count:
            raise IndexError(band)
        return self._make(band) if self._kept is None else self._kept[band]


def _within(buckets: Buckets, inside: npt.NDArray[np.bool_]) -> Buckets:
    """The buckets' members that are ``inside``, where there are two of them."""
    if not len(buckets):
        return buckets
    mine = inside[buckets.members]
    counts = np.add.reduceat(mine, buckets.offsets[:-1], dtype=np.int64)
    part = Buckets(buckets.members[mine], np.cumsum(np.append(0, counts)))
    return part.select(counts > 1)


def roots(parent: Ints) -> Ints:
    """The root of each row of a forest."""
    while True:
        above = parent[parent]
        if np.array_equal(above, parent):
            return above
        parent = above


def _joined(buckets: Sequence[Buckets]) -> Buckets:
    sizes = [np.diff(b.offsets) for b in buckets]
    return Buckets(np.concatenate([b.members for b in buckets]), np.cumsum(np.concatenate([[0], *sizes])))


def _unconnected(buckets: Buckets, parent: Ints) -> Buckets:
    """Without the buckets whose rows are all in one component."""
    if not len(buckets):
        return buckets
    found = roots(parent)[buckets.members]
    begins = buckets.offsets[:-1]
    return buckets.select(np.minimum.reduceat(found, begins) != np.maximum.reduceat(found, begins))


def _batches(buckets: Buckets, texts: CandidateTexts, memory: int) -> Iterator[Buckets]:
    """Consecutive buckets whose texts fit ``memory``; one that alone does not, as pairs of parts of it."""
    if not len(buckets):
        return
    sizes = np.add.reduceat(texts.size(buckets.members), buckets.offsets[:-1])
    begin, held = 0, 0
    for b, size in enumerate([*sizes.tolist(), memory + 1]):
        if held + size <= memory:
            held += size
            continue
        if b > begin:
            cut = buckets.offsets[begin : b + 1]
            yield Buckets(buckets.members[cut[0] : cut[-1]], cut - cut[0])
        begin, held = b, size
        if size > memory and b < len(sizes):
            yield from _halves(buckets.members[buckets.offsets[b] : buckets.offsets[b + 1]], texts, memory)
            begin, held = b + 1, 0


def _halves(members: Ints, texts: CandidateTexts, memory: int) -> Iterator[Buckets]:
    """Every pair of members in some bucket that fits, as far as two texts do."""
    ends = np.cumsum(texts.size(members))
    parts = np.split(members, np.flatnonzero(np.diff(ends // max(memory // 2, 1))) + 1)
    for i, one in enumerate(parts):
        for other in parts[i + 1 :] if i + 1 < len(parts) else [one[:0]]:
            both = np.concatenate([one, other])
            yield Buckets(both, np.array([0, len(both)]))


def _compare(buckets: Buckets, texts: CandidateTexts, parent: Ints, options: SketchOptions,
             max_cluster: int | None) -> None:  # fmt: skip
    rows = np.unique(buckets.members)
    link_similar(
        texts.take(rows), np.searchsorted(rows, buckets.members), buckets.offsets, parent, threshold=options.threshold,
        ngram=options.ngram, unit=options.unit, rows=rows, max_cluster=max_cluster,
    )  # fmt: skip
