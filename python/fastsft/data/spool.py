"""Rows of a run on disk between two stages: what is read, filtered and masked once is not held in memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import orjson

from fastsft.data.records import FIELDS, Record
from fastsft.files import sync, sync_tree

Ints = npt.NDArray[np.int64]
_LINES, _MANIFEST = "rows.jsonl", "manifest.json"
# Values that JSON lacks, which only tables hold, become their text, as templates would write it.
_AS_TEXT = orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_SUBCLASS | orjson.OPT_PASSTHROUGH_DATACLASS


class Spool(Sequence[Record]):
    """The rows that :func:`write_spool` wrote, or some of them, read when asked for; 16 bytes a row are in memory.

    Lines are rows in the formats of :mod:`fastsft.data.records`, with their source and origin besides. Threads may read
    one spool at the same time.
    """

    def __init__(self, folder: Path, rows: Ints | None = None) -> None:
        self.path = folder / _LINES
        self.manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text())
        self.origins: npt.NDArray[np.int32] = np.load(folder / "origins.npy")
        self._ends: Ints = np.load(folder / "ends.npy")
        self._rows = np.arange(len(self._ends)) if rows is None else rows
        self._stream = open(self.path, "rb")  # noqa: SIM115

    def take(self, rows: Ints) -> Spool:
        """Those of a whole spool with these numbers."""
        return Spool(self.path.parent, rows)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, at: int) -> Record: ...
    @overload
    def __getitem__(self, at: slice) -> list[Record]: ...
    def __getitem__(self, at: int | slice) -> Record | list[Record]:
        if isinstance(at, slice):
            return [self._read(row) for row in self._rows[at].tolist()]
        return self._read(int(self._rows[at]))

    def __iter__(self) -> Iterator[Record]:
        return map(self._read, map(int, self._rows))

    def _read(self, row: int) -> Record:
        begin, end = (int(self._ends[row - 1]) if row else 0), int(self._ends[row])
        pieces = []
        while begin < end and (piece := os.pread(self._stream.fileno(), end - begin, begin)):  # at most 2 GiB a call
            pieces.append(piece)
            begin += len(piece)
        value = orjson.loads(b"".join(pieces))
        kind = next(kind for kind, names in FIELDS.items() if names[0] in value)
        common = {name: value[name] for name in ("weight", "origin") if name in value}
        common["skills"] = tuple(value.get("skills", ()))
        if kind == "messages":
            tools = value.get("tools")
            tools = None if tools is None else tuple(tools)
            return Record(kind, value["source"], messages=tuple(value["messages"]), tools=tools, **common)
        return Record(kind, value["source"], parts=tuple(value[name] for name in FIELDS[kind]), **common)


def write_spool(folder: Path, records: Iterable[Record], manifest: Callable[[], dict[str, Any]]) -> None:
    """The records in order, under a temporary name until all of them are on disk; ``manifest`` is called behind the
    last one. One process at a time."""
    stage = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    ends, origins, end = [], [], 0
    with open(stage / _LINES, "wb") as stream:
        for record in records:
            end += stream.write(_line(record))
            ends.append(end)
            origins.append(record.origin)
    np.save(stage / "ends.npy", np.array(ends, np.int64))
    np.save(stage / "origins.npy", np.array(origins, np.int32))
    (stage / _MANIFEST).write_text(json.dumps(manifest()))
    sync_tree(stage)
    stage.rename(folder)
    sync(folder.parent)


def _line(record: Record) -> bytes:
    fields: dict[str, Any] = dict(zip(FIELDS[record.kind], record.parts, strict=False))
    if record.kind == "messages":
        fields["messages"] = record.messages
        if record.tools is not None:
            fields["tools"] = record.tools
    if record.weight != 1.0:
        fields["weight"] = record.weight
    if record.origin:
        fields["origin"] = record.origin
    if record.skills:
        fields["skills"] = record.skills
    return orjson.dumps({**fields, "source": record.source}, default=str, option=_AS_TEXT | orjson.OPT_APPEND_NEWLINE)
