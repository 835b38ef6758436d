"""Files of JSON lines or of one JSON list, plain or compressed, as blocks of whole lines."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fastsft.data.json_list import ListLines, ListWriter, begins_list

_LIST_ENDINGS = (".json", ".json.gz", ".json.zst")  # of files of lines, too
LINE_ENDINGS = (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", *_LIST_ENDINGS)
DAMAGE = (OSError, EOFError, zlib.error)  # what reading a truncated or damaged file raises
LineStream = IO[bytes] | ListWriter
_PIECE = 1 << 17  # of a compressed file: what a piece with damage in it holds is lost


def holds_list(path: Path) -> bool:
    """Whether the file holds one JSON list, of whose items lines are made."""
    if not path.name.endswith(_LIST_ENDINGS):
        return False
    with _open(path) as stream:
        return begins_list(stream)


def in_place(path: Path) -> bool:
    """Whether the lines are the file's own bytes, at the same places."""
    return path.suffix not in (".gz", ".zst") and not holds_list(path)


def open_lines(path: Path) -> IO[bytes]:
    """A binary stream of the file's decompressed bytes, as its name says; of a JSON list one line for each item."""
    stream: Any = ListLines(_open(path)) if holds_list(path) else _open(path)
    return stream  # type: ignore[no-any-return]


def _open(path: Path) -> IO[bytes]:
    stream: Any
    if path.suffix == ".gz":
        stream = gzip.open(path, "rb")  # noqa: SIM115
    elif path.suffix == ".zst":
        import pyarrow as pa

        stream = pa.input_stream(str(path), compression="zstd")
    else:
        stream = open(path, "rb", buffering=0)  # noqa: SIM115
    return stream  # type: ignore[no-any-return]


def create_lines(path: Path, *, listed: bool) -> LineStream:
    """A stream for blocks of whole lines, which arrive in the file compressed as its name says. ``listed``: they are
    those of a JSON list, and a file of such a name becomes one."""
    stream: Any
    if path.suffix == ".gz":
        stream = _GzipFile(path)
    elif path.suffix == ".zst":
        import pyarrow as pa

        stream = pa.CompressedOutputStream(str(path), "zstd")
    else:
        stream = open(path, "wb")  # noqa: SIM115
    if listed:
        return ListWriter(stream, as_list=path.name.endswith(_LIST_ENDINGS))
    return stream  # type: ignore[no-any-return]


def read_blocks(path: Path, size: int, *, start: int = 0) -> Iterator[memoryview]:
    """The decompressed bytes from ``start`` on, in blocks of whole lines of about ``size`` bytes, more where one line
    is longer. A block is valid until the next one is asked for.

    Raises:
        OSError, EOFError, zlib.error: after the last whole line before the damage was given out.
    """
    buffer = bytearray(size)
    filled = 0
    with open_lines(path) as stream:
        pieces = not in_place(path)
        if pieces:
            _skip(stream, start)
        else:
            stream.seek(start)
        damage: Exception | None = None
        while True:
            try:
                view = memoryview(buffer)
                room = view[filled : filled + _PIECE] if pieces else view[filled:]
                count = stream.readinto(room)  # type: ignore[attr-defined]
            except DAMAGE as error:
                damage, count = error, 0
            filled += count
            if count and filled < len(buffer):
                continue
            end = buffer.rfind(b"\n", 0, filled) + 1
            if not count and damage is None:
                end = filled  # the last line needs no newline
            if end:
                yield memoryview(buffer)[:end]
            if not count:
                break
            rest = bytes(memoryview(buffer)[end:filled])
            if not end or len(buffer) > size:  # a new one: views of the old may still be out
                buffer = bytearray(2 * len(rest) if len(rest) >= size else size)
            buffer[: len(rest)] = rest
            filled = len(rest)
        if damage is not None:
            raise damage


def _skip(stream: IO[bytes], count: int) -> None:
    while count > 0:
        count -= len(stream.read(min(count, 1 << 20))) or count


class _GzipFile(gzip.GzipFile):
    """Without name and time in its header, so that equal rows give equal bytes; closes the file that it opened."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115
        super().__init__("", "wb", compresslevel=6, fileobj=self._file, mtime=0)

    def close(self) -> None:
        super().close()
        self._file.close()
