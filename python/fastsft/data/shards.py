"""What deduplication keeps of the rows of files: in memory, or as files that are complete once they have their name.

A shard holds consecutive rows of one source. On disk it is one file: a line of JSON, padded to a multiple of 64 bytes,
then the arrays of :func:`_layout` one behind the other, little-endian.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastsft.files import sync

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ShardInfo:
    """``done``: lines and bytes, or rows, of the source up to the end of the shard; ``last``: it is the source's."""

    source: int
    rows: int
    done: tuple[int, int]
    last: bool
    skipped: dict[str, int]
    skipped_examples: dict[str, list[str]]
    bands: int
    num_perm: int  # 0: without signatures
    rated: bool


def _layout(info: ShardInfo) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    n = info.rows
    arrays: dict[str, tuple[Any, tuple[int, ...]]] = {
        "digests": (np.uint64, (n, 2)),
        "numbers": (np.int64, (n,)),
        "starts": (np.int64, (n,)),
        "sizes": (np.int64, (n,)),
        "lengths": (np.int64, (n,)),
        "keys": (np.int64, (info.bands, n)),
    }
    if info.num_perm:
        arrays["signatures"] = (np.uint32, (n, info.num_perm))
    if info.rated:
        arrays["ratings"] = (np.float64, (n,))
    return {name: (np.dtype(kind).newbyteorder("<"), shape) for name, (kind, shape) in arrays.items()}


class Shard:
    """Rows in memory (``arrays``) or in a file (``path``)."""

    def __init__(self, info: ShardInfo, arrays: dict[str, Array] | None = None, path: Path | None = None) -> None:
        self.info = info
        self._arrays = arrays or {}
        self._path = path
        self._offset = 0

    @staticmethod
    def open(path: Path) -> Shard:
        with open(path, "rb") as stream:
            header = stream.readline()
        fields = json.loads(header)
        shard = Shard(ShardInfo(**{**fields, "done": tuple(fields["done"])}), path=path)
        shard._offset = len(header)
        return shard

    def with_source(self, source: int) -> Shard:
        shard = Shard(dataclasses.replace(self.info, source=source), self._arrays, self._path)
        shard._offset = self._offset
        return shard

    def save(self, path: Path) -> Shard:
        """Write it under another name, then give it its own: a reader sees all of it or nothing."""
        stage = path.with_name(f".{path.name}.tmp")
        header = json.dumps(self.info.__dict__)
        with open(stage, "wb") as stream:
            stream.write((header + " " * (-(len(header) + 1) % 64) + "\n").encode())
            for name, (kind, _) in _layout(self.info).items():
                np.ascontiguousarray(self.read(name), kind).tofile(stream)
        sync(stage)
        stage.replace(path)
        sync(path.parent)
        return Shard.open(path)

    def read(self, name: str, part: int | None = None) -> Array:
        """An array, or row ``part`` of it."""
        if self._path is None:
            return self._arrays[name] if part is None else self._arrays[name][part]
        offset = self._offset
        for other, (kind, shape) in _layout(self.info).items():
            if other == name:
                break
            offset += kind.itemsize * int(np.prod(shape))
        if part is not None:
            shape = shape[1:]
            offset += part * kind.itemsize * int(np.prod(shape))
        return np.fromfile(self._path, kind, int(np.prod(shape)), offset=offset).reshape(shape)


class Shards:
    """All shards of a run in order: rows are numbered through."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = list(shards)
        self.offsets = np.cumsum([0, *(s.info.rows for s in self.shards)])
        self._sources = np.array([s.info.source for s in self.shards], np.int64)  # they ascend

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def read(self, name: str, part: int | None = None) -> Array:
        """An array of all rows."""
        return np.concatenate([s.read(name, part) for s in self.shards])

    def of_source(self, source: int) -> slice:
        """The rows of a source."""
        begin, end = np.searchsorted(self._sources, [source, source + 1])
        return slice(int(self.offsets[begin]), int(self.offsets[end]))

    def source_of(self, row: int) -> int:
        return self.shards[self._shard_of(row)].info.source

    def _shard_of(self, row: int) -> int:
        return int(np.searchsorted(self.offsets, row, side="right")) - 1

    def loaded(self, *names: str) -> Shards:
        """The same rows with these arrays alone, in memory."""
        return Shards([Shard(s.info, {name: s.read(name) for name in names}) for s in self.shards])

    def chosen(self, name: str, rows: npt.NDArray[np.int64]) -> Array:
        """An array's values for some rows, which ascend."""
        pieces = [s.read(name)[at] for s, at in self._split(rows)]
        return np.concatenate(pieces) if pieces else self.read(name)[:0]

    def _split(self, rows: npt.NDArray[np.int64]) -> Iterator[tuple[Shard, npt.NDArray[np.int64]]]:
        if not len(rows):
            return
        begin, end = self._shard_of(int(rows[0])), self._shard_of(int(rows[-1])) + 1  # of thousands, often one
        cuts = np.searchsorted(rows, self.offsets[begin : end + 1])
        for i in range(begin, end):
            mine = rows[cuts[i - begin] : cuts[i - begin + 1]]
            if len(mine):
                yield self.shards[i], mine - self.offsets[i]


def open_shards(folder: Path) -> Shards:
    """The complete shards of a folder."""
    return Shards([Shard.open(p) for p in sorted(folder.glob("*.shard"))])


def by_source(folder: Path | None) -> dict[int, list[Shard]]:
    """The complete shards of a folder by their source, in order; of no folder none."""
    found: dict[int, list[Shard]] = {}
    for shard in open_shards(folder).shards if folder is not None else []:
        found.setdefault(shard.info.source, []).append(shard)
    return found
