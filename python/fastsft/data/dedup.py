"""Exact and near duplicates among records: which to keep, which belong together, and why."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fastsft import ops
from fastsft.data.records import Problems, Record, read_records

Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class DedupReport:
    """``keep[i]`` tells whether record i stays; ``labels[i]`` is the number of the first record of its cluster."""

    keep: npt.NDArray[np.bool_]
    labels: npt.NDArray[np.int64]
    exact_duplicates: int  # removed because an identical record came before
    near_duplicates: int  # removed because a similar one did
    sources: Sequence[str] = field(repr=False)
    texts: Sequence[str] = field(repr=False)

    def clusters(self, limit: int | None = None) -> list[npt.NDArray[np.int64]]:
        """Members of each cluster of two or more, largest first."""
        order = np.argsort(self.labels, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(self.labels[order])) + 1) if len(order) else []
        large = sorted((g for g in groups if len(g) > 1), key=lambda g: (-len(g), int(g[0])))
        return large[:limit]

    def histogram(self) -> dict[int, int]:
        """Cluster size -> number of clusters of that size, singletons included."""
        sizes, counts = np.unique(np.unique(self.labels, return_counts=True)[1], return_counts=True)
        return {int(s): int(c) for s, c in zip(sizes, counts, strict=True)}

    def to_dict(self, examples: int = 20) -> dict[str, Any]:
        """JSON-serialisable summary with the largest clusters."""
        return {
            "records": len(self.keep),
            "kept": int(self.keep.sum()),
            "exact_duplicates": self.exact_duplicates,
            "near_duplicates": self.near_duplicates,
            "cluster_sizes": self.histogram(),
            "clusters": [
                {"size": len(c), "sources": [self.sources[i] for i in c[:10]], "example": self.texts[c[0]][:400]}
                for c in self.clusters(examples)
            ],
        }


def dedup(
    records: Sequence[Record | str | os.PathLike[str]] | str | os.PathLike[str],
    *,
    threshold: float = 0.7,
    num_perm: int = 128,
    ngram: int = 5,
    unit: Literal["word", "char"] = "word",
    mode: Literal["near", "exact"] = "near",
    seed: int = 0,
    progress: Progress | None = None,
) -> DedupReport:
    """Find duplicates among records, texts or the rows of files; the first of each cluster is kept.

    Near duplicates are texts whose MinHash signatures (Broder 1997) agree in at least ``threshold`` of ``num_perm``
    places, found by banded locality-sensitive hashing: an estimate of the Jaccard similarity of their sets of word (or
    character) ``ngram``-grams, with standard error sqrt(J (1 - J) / num_perm).

    Args:
        records: one path to a JSONL(.gz)/Parquet file or datasets folder; or a list of records, texts (strings) and
            files (:class:`pathlib.Path`).

    Raises:
        DataError: a file that cannot be read, or a broken row. ValueError: a parameter out of range.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"dedup: threshold: expected a number above 0 and at most 1, got {threshold}")
    if mode not in ("near", "exact"):
        raise ValueError(f"dedup: mode: expected 'near' or 'exact', got {mode!r}")
    rows: list[Record] = []
    for i, given in enumerate([Path(records)] if isinstance(records, str | os.PathLike) else records):
        if isinstance(given, os.PathLike):
            rows += read_records([given], Problems("fail"))
        else:
            rows.append(Record("text", f"#{i}", parts=(given,)) if isinstance(given, str) else given)
    texts = [r.text() for r in rows]

    first: dict[bytes, int] = {}
    exact = np.fromiter(
        (first.setdefault(hashlib.blake2b(r.canonical(), digest_size=16).digest(), i) for i, r in enumerate(rows)),
        np.int64, len(rows),
    )  # fmt: skip
    unique = np.flatnonzero(exact == np.arange(len(texts)))
    labels = exact
    if mode == "near" and len(unique):
        chunks = []
        for begin in range(0, len(unique), 8192):
            part = [texts[i] for i in unique[begin : begin + 8192]]
            chunks.append(ops.minhash_signatures(part, num_perm=num_perm, ngram=ngram, unit=unit, seed=seed))
            if progress:
                progress("signatures", begin + len(part), len(unique))
        near = ops.lsh_clusters(np.concatenate(chunks), threshold=threshold)
        root = np.arange(len(texts))
        root[unique] = unique[near]
        labels = root[exact]
    keep = labels == np.arange(len(texts))
    removed_exact = len(texts) - len(unique)
    return DedupReport(keep, labels, removed_exact, int((~keep).sum()) - removed_exact, [r.source for r in rows], texts)


def kept(records: Sequence[Record], report: DedupReport) -> Iterator[Record]:
    return (r for r, k in zip(records, report.keep, strict=True) if k)
