"""Exact and near duplicates among records: which to keep, which belong together, and why."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fastsft import ops
from fastsft.data.compared import lacking, names_of, text_of
from fastsft.data.keep import Keep, choose
from fastsft.data.records import Problems, Record, of_memory, read_records
from fastsft.progress import Progress

MAX_CLUSTER = 1000  # different texts in one cluster
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class DedupReport:
    """``keep[i]`` tells whether record i stays, one of each cluster; ``labels[i]`` is the number of the first record of
    its cluster."""

    keep: npt.NDArray[np.bool_]
    labels: npt.NDArray[np.int64]
    exact_duplicates: int  # removed because an identical record came before
    near_duplicates: int  # removed because a similar one did
    sources: Sequence[str] = field(repr=False)
    texts: Sequence[str] = field(repr=False)

    def clusters(self, limit: int | None = None) -> list[npt.NDArray[np.int64]]:
        """Members of each cluster of two or more, largest first."""
        order = np.argsort(self.labels, kind="stable")
        begins = np.flatnonzero(np.append(True, np.diff(self.labels[order]) != 0))[: len(order)]
        sizes = np.diff(np.append(begins, len(order)))
        large = np.flatnonzero(sizes > 1)
        large = large[np.lexsort((order[begins[large]], -sizes[large]))][:limit]
        return [order[b : b + n] for b, n in zip(begins[large].tolist(), sizes[large].tolist(), strict=True)]

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
    records: Sequence[Record | str | dict[str, Any] | os.PathLike[str]] | str | os.PathLike[str],
    *,
    threshold: float = 0.7,
    num_perm: int = 128,
    ngram: int = 5,
    unit: Literal["word", "char"] = "word",
    mode: Literal["near", "all_pairs", "exact"] = "near",
    on: Sequence[str] | None = None,
    keep: Keep = "first",
    prefer: Sequence[str | os.PathLike[str]] = (),
    score: Callable[[Record], float] | None = None,
    verify: bool = True,
    max_cluster: int | None = MAX_CLUSTER,
    seed: int = 0,
    progress: Progress | None = None,
) -> DedupReport:
    """Find duplicates among records, texts or the rows of files, and choose one of each cluster.

    Near duplicates are texts whose sets of word (or character) ``ngram``-grams have a Jaccard similarity of at least
    ``threshold``, directly or through others. The candidates are found by MinHash (Broder 1997) and bands, and compared
    exactly: see :func:`fastsft.ops.near_duplicates`.

    Args:
        records: one path to a JSONL(.gz, .zst) or Parquet file, datasets folder or folder of files; or a list of
            records, texts (strings), rows (dicts, as files have them) and files (:class:`pathlib.Path`).
        num_perm, unit, seed: as for :func:`fastsft.ops.near_duplicates`.
        mode: "near" and "all_pairs" (which misses no pair) include exact duplicates; "exact" finds nothing else.
        on: what is compared, by default the whole record: names among "text"; "prompt", "completion"; "prefix",
            "suffix", "middle"; and the roles of messages, such as "user" and "assistant".
        keep, prefer, score: which record of a cluster stays, see :func:`fastsft.data.keep.choose`; ``prefer`` lists
            files for ``keep="source"``, ``score`` rates a record for ``keep="score"``.
        verify: False takes all candidates for near duplicates.
        max_cluster: limit of the different texts in one cluster, against chains of similar texts whose ends have
            nothing in common: larger ones become stars of texts that are all similar to one of them
            (:func:`fastsft.ops.near_duplicates`). The default keeps at least one in a thousand whatever the data are,
            and real clusters are smaller; None is no limit.
        progress: called with (stage, done, total).

    Returns:
        Which records stay, each one's cluster, and the counts.

    Raises:
        DataError: a file that cannot be read, or a broken row. ValueError: a parameter out of range, a record that has
            none of the fields in ``on`` or, unless ``mode`` is "exact", a lone surrogate.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"dedup: threshold: expected a number above 0 and at most 1, got {threshold}")
    if mode not in ("near", "all_pairs", "exact"):
        raise ValueError(f"dedup: mode: expected 'near', 'all_pairs' or 'exact', got {mode!r}")
    on = names_of(on)
    rows: list[Record] = []
    for i, given in enumerate([Path(records)] if isinstance(records, str | os.PathLike) else records):
        if isinstance(given, os.PathLike):
            rows += read_records([given], Problems("fail"))
        else:
            rows.append(of_memory(given, i))
    texts = [_text(r, on) for r in rows]
    contents = (r.canonical() for r in rows) if on is None else (t.encode("utf-8", "surrogatepass") for t in texts)

    first: dict[bytes, int] = {}
    exact = np.fromiter(
        (first.setdefault(hashlib.blake2b(c, digest_size=16).digest(), i) for i, c in enumerate(contents)),
        np.int64, len(rows),
    )  # fmt: skip
    unique = np.flatnonzero(exact == np.arange(len(texts)))
    labels = exact
    if mode != "exact" and len(unique):
        if progress:
            progress("near duplicates", 0, len(unique))
        for i in unique.tolist():
            if _SURROGATE.search(texts[i]):
                raise ValueError(f"dedup: {rows[i].source}: expected text, got a lone surrogate")
        near = ops.near_duplicates(
            [texts[i] for i in unique], threshold=threshold, num_perm=num_perm, ngram=ngram, unit=unit, verify=verify,
            max_cluster=max_cluster, seed=seed, mode="lsh" if mode == "near" else mode,
        )  # fmt: skip
        if progress:
            progress("near duplicates", len(unique), len(unique))
        root = np.arange(len(texts))
        root[unique] = unique[near]
        labels = root[exact]
    keep_mask = choose(rows, labels, texts, keep, prefer=[os.fspath(p) for p in prefer], score=score)
    removed_exact = len(texts) - len(unique)
    near_count = int((~keep_mask).sum()) - removed_exact
    return DedupReport(keep_mask, labels, removed_exact, near_count, [r.source for r in rows], texts)


def _text(record: Record, on: Sequence[str] | None) -> str:
    text = text_of(record, on)
    if text is None:
        raise ValueError(f"dedup: on: {record.source}: {lacking(record, on)}")
    return text


def kept(records: Sequence[Record], report: DedupReport) -> Iterator[Record]:
    return (r for r, k in zip(records, report.keep, strict=True) if k)
