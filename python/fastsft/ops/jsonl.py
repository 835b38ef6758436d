"""String fields of JSON Lines, found and unescaped natively."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastsft import _C
from fastsft.ops import _registry

DECIDED, UNDECIDED, BLANK = 0, 1, 2


@dataclass(frozen=True)
class JsonlFields:
    """Lines of a buffer and their strings, for N lines and F fields.

    Attributes:
        lines: int64 [N + 1]; line i is ``data[lines[i] : lines[i + 1]]``, its newline included.
        status: uint8 [N]; DECIDED, UNDECIDED (left to a full parser) or BLANK.
        text: uint8; the strings one behind the other, as UTF-8.
        offsets: int64 [N * F + 1]; field f of line i begins at ``offsets[i * F + f]`` and ends where the next begins,
            its separator included. Lines that are not decided have empty strings.
    """

    lines: npt.NDArray[np.int64]
    status: npt.NDArray[np.uint8]
    text: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]


def jsonl_fields(
    data: bytes | memoryview | npt.NDArray[np.uint8],
    fields: Sequence[str],
    *,
    without: Sequence[str] = (),
    separator: str = "",
    out: npt.NDArray[np.uint8] | None = None,
) -> JsonlFields:
    """The named top-level strings of every line that is plainly a JSON object with them.

    A line is decided only if it is one JSON object (RFC 8259, valid UTF-8) that has each of ``fields`` once, as a
    string, and none of ``without``: then every strict parser accepts it and finds the same strings. All other lines,
    broken ones and valid but rare ones (keys with escapes, more than 64 levels, numbers that a double might not hold),
    are left undecided for a full parser to say what they are. Lines are independent and are read on all threads,
    without holding the GIL.

    Args:
        data: whole lines; the last one need not end in a newline. Fastest as a buffer or a uint8 array.
        fields: F different names, the order in which a line's strings stand in the result.
        without: names that leave a line undecided.
        separator: at most one ASCII character, put behind every string of a line but its last.
        out: uint8, at least as large as data, not overlapping it: holds the text, to spare an allocation.

    Returns:
        :class:`JsonlFields`; the same on every machine, whatever the number of threads.

    Raises:
        ValueError: no field, a name twice, a longer separator, or an ``out`` that is too small.
    """
    if isinstance(fields, str):
        raise ValueError(f"jsonl_fields: fields: expected a sequence of names, got {fields!r}")
    if isinstance(data, np.ndarray):
        if data.dtype != np.uint8 or data.ndim != 1:
            raise ValueError(f"jsonl_fields: data: expected uint8 [bytes], got {data.dtype}{list(data.shape)}")
        view = np.ascontiguousarray(data)
    else:
        view = np.frombuffer(data, np.uint8)
    n = _C.jsonl_count(view)
    lines = np.empty(n + 1, np.int64)
    status = np.empty(n, np.uint8)
    offsets = np.empty(n * len(fields) + 1, np.int64)
    text = np.empty(len(view), np.uint8) if out is None else out
    if text.dtype != np.uint8 or text.ndim != 1 or len(text) < len(view):
        got = f"{text.dtype}{list(text.shape)}"
        raise ValueError(f"jsonl_fields: out: expected uint8 with room for {len(view)} bytes, got {got}")
    used = _C.jsonl_fields(view, list(fields), list(without), separator, lines, status, text, offsets)
    return JsonlFields(lines, status, text[:used], offsets)


_registry.record(
    "jsonl_fields",
    cpu=_registry.Implementation("native", "C++ kernel"),
    cuda=_registry.Implementation("none", "text lives on the host"),
)
