"""Files of JSON lines, plain or compressed, as blocks of whole lines."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

LINE_ENDINGS = (".jsonl", ".ndjson", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")
DAMAGE = (OSError, EOFError, zlib.error)  # what reading a truncated or damaged file raises
_PIECE = 1 << 17  # of a compressed file: what a piece with damage in it holds is lost


def open_lines(path: Path) -> IO[bytes]:
    """A binary stream of the file's decompressed bytes, as its name says."""
    stream: Any
    if path.suffix == ".gz":
        stream = gzip.open(path, "rb")  # noqa: SIM115
    elif path.suffix == ".zst":
        import pyarrow as pa

        stream = pa.input_stream(str(path), compression="zstd")
    else:
        stream = open(path, "rb", buffering=0)  # noqa: SIM115
    return stream  # type: ignore[no-any-return]


def create_lines(path: Path) -> IO[bytes]:
    """A stream whose bytes arrive in the file compressed as its name says."""
    stream: Any
    if path.suffix == ".gz":
        stream = _GzipFile(path)
    elif path.suffix == ".zst":
        import pyarrow as pa

        stream = pa.CompressedOutputStream(str(path), "zstd")
    else:
        stream = open(path, "wb")  # noqa: SIM115
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
        compressed = path.suffix in (".gz", ".zst")
        if compressed:
            _skip(stream, start)
        else:
            stream.seek(start)
        damage: Exception | None = None
        while True:
            try:
                view = memoryview(buffer)
                room = view[filled : filled + _PIECE] if compressed else view[filled:]
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
