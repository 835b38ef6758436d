"""First stage of deduplication: rows of files to digests and band keys, shard by shard. Texts are not kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fastsft import ops
from fastsft.data.problems import Problems
from fastsft.data.shards import Shard, ShardInfo, Shards, by_source
from fastsft.data.sources import Source
from fastsft.data.text_batch import TextBatch
from fastsft.data.texts import read_texts
from fastsft.ops.minhash import lsh_shape
from fastsft.progress import Progress


@dataclass(frozen=True)
class SketchOptions:
    """What shards depend on besides the sources. ``mode`` "exact" needs no keys; ``rating`` is what is kept of each
    row to choose by: nothing, its score, or the length of its text in characters."""

    mode: Literal["near", "exact"] = "near"
    threshold: float = 0.7
    num_perm: int = 128
    ngram: int = 5
    unit: Literal["word", "char"] = "word"
    seed: int = 0
    fields: Mapping[str, str] = field(default_factory=dict)
    keep_signatures: bool = False
    rating: Literal["none", "score", "length"] = "none"

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"dedup: threshold: expected a number above 0 and at most 1, got {self.threshold}")
        if self.mode not in ("near", "exact"):
            raise ValueError(f"dedup: mode: expected 'near' or 'exact', got {self.mode!r}")
        if self.ngram < 1:
            raise ValueError(f"dedup: ngram: expected >= 1, got {self.ngram}")

    @property
    def shape(self) -> tuple[int, int]:
        """(bands, rows) of the signatures."""
        return (0, 0) if self.mode == "exact" else lsh_shape(self.num_perm, self.threshold)


def scan(
    sources: Sequence[Source],
    options: SketchOptions,
    problems: Problems,
    *,
    folder: Path | None,
    memory: int,
    base: int = 0,
    progress: Progress | None = None,
) -> Shards:
    """All rows of the sources, which are numbered from ``base`` on. With a ``folder``, shards lie there, and those
    there already are not made again.

    Raises:
        DataError: an unusable row, where ``problems`` says so.
    """
    found: list[Shard] = []
    rows = 0
    made = by_source(folder)
    for index, source in enumerate(sources, base):
        for shard in scan_source(index, source, options, problems, made.get(index, []), folder=folder, memory=memory):
            skipped, examples = shard.info.skipped, shard.info.skipped_examples
            if skipped and problems.mode == "fail":  # there already, from an interrupted run that left such rows out
                problems.refuse(next(iter(examples.values()))[0])
            problems.merge({"counts": skipped, "examples": examples, "unusable": sum(skipped.values())})
            found.append(shard)
            rows += shard.info.rows
            if progress:
                progress("reading rows", rows, 0)
    return Shards(found)


def scan_source(
    index: int, source: Source, options: SketchOptions, problems: Problems, made: Sequence[Shard], *,
    folder: Path | None, memory: int,
) -> Iterator[Shard]:  # fmt: skip
    """The shards of one source, of which those ``made`` lie in the folder. ``problems`` says what to do with unusable
    rows; they are counted in the shards."""
    # of `memory`: a block and its texts, their signatures and keys (not more than the text), and what a shard gathers
    batch_bytes = max(1 << 16, min(1 << 22, memory // 32))
    shard_bytes = max(batch_bytes, memory // 8)
    yield from made
    if made and made[-1].info.last:
        return
    done, count = made[-1].info.done if made else (0, 0), len(made)
    # one reader for all shards: of a compressed file, to start anew is to read all from the beginning
    mine = Problems(problems.mode, problems.skip)
    gathered = _Gathered(index, options, done)
    for batch in read_texts(source, mine, fields=options.fields, batch_bytes=batch_bytes, start=done):
        gathered.add(batch)
        if folder is not None and gathered.bytes >= shard_bytes:
            yield gathered.cut(mine, last=False).save(_shard_path(folder, index, count))
            count += 1
    shard = gathered.cut(mine, last=True)
    yield shard if folder is None else shard.save(_shard_path(folder, index, count))


def _shard_path(folder: Path, index: int, count: int) -> Path:
    return folder / f"{index:06d}-{count:06d}.shard"


class _Gathered:
    """Batches on the way to shards of one source, of which ``done`` lies before them."""

    def __init__(self, source: int, options: SketchOptions, done: tuple[int, int]) -> None:
        self._source, self._options, self._done = source, options, done
        self._bands, self._rows = options.shape
        self._arrays: dict[str, list[Any]] = {}
        self.bytes = 0

    def add(self, batch: TextBatch) -> None:
        o = self._options
        arrays: dict[str, Any] = {
            "digests": batch.digests, "numbers": batch.numbers, "starts": batch.starts, "sizes": batch.sizes,
            "lengths": np.diff(batch.texts[1]),
        }  # fmt: skip
        if o.rating != "none":
            arrays["ratings"] = batch.scores if o.rating == "score" else _characters(batch.texts)
        keys = np.empty((0, len(batch)), np.int64)
        if self._bands:
            signatures = ops.minhash_signatures(
                batch.texts, num_perm=o.num_perm, ngram=o.ngram, unit=o.unit, seed=o.seed
            )  # fmt: skip
            keys = ops.lsh_keys(signatures, bands=self._bands, rows=self._rows)
            if o.keep_signatures:
                arrays["signatures"] = signatures
        arrays["keys"] = keys
        for name, array in arrays.items():
            self._arrays.setdefault(name, []).append(array)
        self._done = batch.done
        self.bytes += int(batch.sizes.sum()) + sum(a.nbytes for a in arrays.values())

    def cut(self, problems: Problems, *, last: bool) -> Shard:
        """The shard of what was added since the last one, with its problems, which begin anew."""
        if not self._arrays:
            self.add(dataclasses.replace(_EMPTY, done=self._done))
        arrays = {name: np.concatenate(a, axis=int(name == "keys")) for name, a in self._arrays.items()}
        info = ShardInfo(
            self._source, len(arrays["numbers"]), self._done, last, dict(problems.counts), dict(problems.examples),
            self._bands, self._options.num_perm if "signatures" in arrays else 0, "ratings" in arrays,
        )  # fmt: skip
        self._arrays.clear()
        self.bytes = 0
        problems.counts.clear()
        problems.examples.clear()
        return Shard(info, arrays)


def _characters(texts: tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]) -> npt.NDArray[np.float64]:
    """The lengths of texts, as Python counts: of UTF-8, the bytes that begin a character."""
    data, offsets = texts
    counts = np.zeros(len(offsets) - 1)
    full = np.flatnonzero(np.diff(offsets))
    if len(full):
        begins = (data[offsets[0] : offsets[-1]] & 0xC0) != 0x80
        counts[full] = np.add.reduceat(begins, offsets[full] - offsets[0], dtype=np.int64)
    return counts


_NONE = np.empty(0, np.int64)
_EMPTY = TextBatch(
    (np.empty(0, np.uint8), np.zeros(1, np.int64)), np.empty((0, 2), np.uint64), _NONE, _NONE, _NONE,
    np.empty(0), (0, 0),
)  # fmt: skip
