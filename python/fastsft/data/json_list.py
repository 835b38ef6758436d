"""One JSON list of rows read as lines, and lines written as such a list."""

from __future__ import annotations

import io
import re
from typing import IO, Any

# Up to the next byte that matters: between items, within an item (whole strings are passed over), and within a string
# that the items' pattern did not find the end of. A match keeps a place for each repeat of a group, hence the limits.
_BETWEEN = re.compile(rb'[^"\[\]{},]*')
_ITEM = re.compile(rb'(?:[^"\[\]{}]+|"[^"\\]*(?:\\.[^"\\]*){0,1000}"){0,1000}', re.DOTALL)
_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*){0,1000}', re.DOTALL)
_QUOTE, _BACKSLASH, _COMMA, _OPENING, _CLOSING = *b'"\\,', b"[{", b"]}"
_WHITE_SPACE = b" \t\r\n"
_PIECE = 1 << 17


def begins_list(stream: IO[bytes]) -> bool:
    """Whether the first byte of a stream that is no white space opens a list."""
    while piece := stream.read(1 << 10):
        if first := piece.lstrip(_WHITE_SPACE)[:1]:
            return first == b"["
    return False


class ListLines(io.RawIOBase):
    """The stream of one JSON list as lines, one for each item, found without parsing the items.

    Line feeds in an item become carriage returns: between its parts both are white space, and within a string neither
    is allowed, so that a parser says of the line what it would say of the item.

    Raises:
        EOFError: at the end of a stream before that of the list. OSError: where something follows the list.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._depth = 0  # of lists and objects, the list itself included
        self._in_string = self._ended = self._followed = False
        self._carried = b""  # a backslash whose next byte is not there yet
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, room: Any) -> int:
        while not self._ready:
            if self._followed:
                raise OSError("expected nothing but white space behind the list")
            piece = self._stream.read(_PIECE)
            if not piece and not self._ended:
                raise EOFError("the list does not end")
            if not piece:
                return 0
            self._ready = memoryview(self._lines(self._carried + piece))
        count = min(len(room), len(self._ready))
        room[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()

    def _lines(self, data: bytes) -> bytes:
        """The next bytes of the list without its brackets and with a line feed for each comma of its own."""
        lines: list[bytes] = []
        begin, self._carried = 0, b""  # the item that is being read
        at = 0
        while at < len(data) and not self._ended:
            pattern = _STRING if self._in_string else _ITEM if self._depth > 1 else _BETWEEN
            at = pattern.match(data, at).end()  # type: ignore[union-attr]
            if at == len(data):
                break
            byte = data[at]
            if byte == _QUOTE:
                self._in_string = not self._in_string
            elif self._in_string:
                if byte == _BACKSLASH and at + 1 == len(data):
                    self._carried = data[at:]
                    break
                continue  # the limit of repeats
            elif byte in _OPENING:
                self._depth += 1
                if self._depth == 1:
                    begin = at + 1
            elif byte == _COMMA and self._depth == 1:
                lines.append(data[begin:at].replace(b"\n", b"\r"))
                begin = at + 1
            elif byte in _CLOSING:
                self._depth -= 1
                self._ended = self._depth == 0
                if self._ended:
                    lines.append(data[begin:at].replace(b"\n", b"\r"))
            at += 1
        if not self._ended:
            lines.append(data[begin:at].replace(b"\n", b"\r"))
        elif data[at:].strip(_WHITE_SPACE):
            self._followed = True
        return b"\n".join(lines)


class ListWriter:
    """Lines of :class:`ListLines`, the white space in items as it was, as one list again or as lines."""

    def __init__(self, stream: Any, *, as_list: bool) -> None:
        self._stream = stream
        self._as_list = as_list
        self._between = b"[\n"

    def write(self, lines: bytes) -> None:
        """Whole lines."""
        if not self._as_list:
            self._stream.write(lines.replace(b"\r", b" "))
            return
        for line in lines.split(b"\n"):
            if item := line.strip(_WHITE_SPACE):
                self._stream.write(self._between + item.replace(b"\r", b"\n"))
                self._between = b",\n"

    def __enter__(self) -> ListWriter:
        return self

    def __exit__(self, *error: object) -> None:
        with self._stream:
            if self._as_list and error[0] is None:
                self._stream.write(b"[]\n" if self._between == b"[\n" else b"\n]\n")
