"""Which rows of a run are trained on and which are held out: deduplication, decontamination, caps and the split.

Of each row, some 200 bytes are in memory, and texts a batch at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from fastsft.config import Config, DataOptions
from fastsft.data.decontaminate import decontaminate
from fastsft.data.dedup import MAX_CLUSTER, DedupReport
from fastsft.data.link import LinkOptions, link
from fastsft.data.mixture import sources_of
from fastsft.data.problems import Problems
from fastsft.data.records import Record
from fastsft.data.scan import SketchOptions, scan
from fastsft.data.sources import find_sources
from fastsft.data.spool import Spool
from fastsft.progress import Progress

Ints = npt.NDArray[np.int64]
MEMORY = 1 << 30  # bytes that deduplication may hold besides what it keeps of each row


def select(config: Config, rows: Spool, work: Path, tell: Progress) -> tuple[Ints, Ints, dict[str, Any]]:
    """The numbers of the rows to train on, of those held out, and what a report says of the others.

    Args:
        work: folder for what deduplication has finished, so that a killed run does not do it again.

    Raises:
        DataError, ValueError: evaluation files or rules that :func:`fastsft.decontaminate` refuses.
    """
    options, chosen = config.data, np.arange(len(rows))
    report: dict[str, Any] = {}
    if options.dedup.mode != "none" and len(rows):
        found = _dedup(config, rows, work, tell)
        chosen = np.flatnonzero(found.keep)
        report["dedup"] = found.to_dict()
    if options.decontaminate.against:
        clean = decontaminate(
            rows.take(chosen),
            against=options.decontaminate.against,
            rules=options.decontaminate.rules,
            against_fields=options.decontaminate.fields,
            progress=tell,
        )
        chosen = chosen[clean.keep]
        report["decontaminate"] = clean.to_dict()
    left_out = _above_caps(rows, chosen, options, config.seed)
    chosen = np.setdiff1d(chosen, left_out)
    report["capped"] = len(left_out)
    if options.eval:
        return chosen, chosen[:0], report
    held = held_out(rows.take(chosen), options.eval_fraction, config.seed)
    return chosen[~held], chosen[held], report


def held_out(records: Sequence[Record], fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """About ``fraction`` of the records, chosen by a hash of their content: equal rows fall on the same side."""
    if fraction == 0:
        return np.zeros(len(records), np.bool_)
    return np.asarray(_digests(records, str(seed), "<u8") < np.uint64(int(fraction * 2**64)))


def _dedup(config: Config, rows: Spool, work: Path, tell: Progress) -> DedupReport:
    options = config.data.dedup
    sketch = SketchOptions(options.mode, options.threshold, options.num_perm, seed=config.seed)  # type: ignore[arg-type]
    sources = find_sources(rows.path)
    work.mkdir(exist_ok=True)
    shards = scan(sources, sketch, Problems("fail"), folder=work, memory=MEMORY, progress=tell)
    first, labels = link(
        sources, shards, sketch, LinkOptions(max_cluster=MAX_CLUSTER), memory=MEMORY, folder=work, progress=tell
    )
    keep = labels == np.arange(len(labels))
    exact = int((first != np.arange(len(first))).sum())
    near = int((~keep).sum()) - exact
    return DedupReport(keep, labels, exact, near, _Column(rows, lambda r: r.source), _Column(rows, Record.text))


class _Column(Sequence[str]):
    """A text of each row, looked up when asked for."""

    def __init__(self, rows: Spool, read: Callable[[Record], str]) -> None:
        self._rows, self._read = rows, read

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        return [self._read(r) for r in self._rows[at]] if isinstance(at, slice) else self._read(self._rows[at])


def _above_caps(rows: Spool, chosen: Ints, options: DataOptions, seed: int) -> Ints:
    """The rows above the ``cap`` of their source, which keeps those with the smallest hashes."""
    left_out = [chosen[:0]]
    for origin, source in enumerate(sources_of(options)):
        members = chosen[rows.origins[chosen] == origin]
        if source.cap is not None and len(members) > source.cap:
            order = np.argsort(_digests(rows.take(members), f"cap {seed}", ">u8"), kind="stable")
            left_out.append(members[order[source.cap :]])
    return np.concatenate(left_out)


def _digests(records: Sequence[Record], key: str, order: str) -> npt.NDArray[np.uint64]:
    """Of all that a record's sample is made of, as integers of this byte order."""
    found = (hashlib.blake2b(r.canonical(), digest_size=8, key=key.encode()).digest() for r in records)
    return np.frombuffer(b"".join(found), order)
