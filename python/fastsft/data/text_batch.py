"""Rows as buffers of text with offsets, and the digests that tell equal rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastsft import ops
from fastsft.data.records import FIELDS, Kind, Record

Ints = npt.NDArray[np.int64]

# The parts of a text in the order in which Record.text() joins them, and what stands between.
PARTS: dict[Kind, tuple[str, ...]] = {
    "text": ("text",),
    "prompt_completion": ("prompt", "completion"),
    "fim": ("prefix", "middle", "suffix"),
}
SEPARATORS: dict[Kind, str] = {"text": "", "prompt_completion": "\n", "fim": ""}
# Fields that make a row something else than its own format: its texts are then not to be taken as they stand.
OTHERS = {"weight", "skills", "conversations", "instruction", "output"}


@dataclass(frozen=True)
class TextBatch:
    """Consecutive usable rows of one file.

    Attributes:
        texts: uint8 [bytes] and int64 [n + 1]: :func:`fastsft.data.compared.text_of` each row, as UTF-8.
        digests: uint64 [n, 2]: equal for rows of equal content, which is all but the weight, or of equal texts where
            the source names the fields compared.
        numbers: int64 [n]: line or row, from 1.
        starts, sizes: int64 [n]: a line's bytes within the decompressed file; of tables the row from 0, and the text's
            length.
        scores: float64 [n]: the field that the source names, or the weight.
        done: rows and lines of the file behind this batch, and bytes (lines) or rows (tables).
    """

    texts: tuple[npt.NDArray[np.uint8], Ints]
    digests: npt.NDArray[np.uint64]
    numbers: Ints
    starts: Ints
    sizes: Ints
    scores: npt.NDArray[np.float64]
    done: tuple[int, int]

    def __len__(self) -> int:
        return len(self.numbers)


def digest_records(records: Sequence[Record]) -> npt.NDArray[np.uint64]:
    """uint64 [n, 2], as in :class:`TextBatch`."""
    out = np.empty((len(records), 2), np.uint64)
    kinds = [r.kind for r in records]
    for kind in set(kinds):
        chosen = [i for i, k in enumerate(kinds) if k == kind]
        width = len(PARTS.get(kind, "x"))
        parts = [part for i in chosen for part in _parts(records[i])]
        out[chosen] = combine(kind, ops.text_digests(parts).reshape(len(chosen), width, 2))
    return out


def _parts(record: Record) -> list[str]:
    """The texts that a digest is made of, separators included."""
    if record.kind not in PARTS:
        return [record.canonical().decode()]
    by_name = dict(zip(FIELDS[record.kind], record.parts, strict=True))
    names = PARTS[record.kind]
    return [by_name[n] + (SEPARATORS[record.kind] if n != names[-1] else "") for n in names]


def combine(kind: Kind, parts: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """[n, F, 2] -> [n, 2]: each step is a bijection of either operand."""
    h = np.full((len(parts), 2), list(FIELDS).index(kind) + 1, np.uint64)
    for f in range(parts.shape[1]):
        h = (h ^ parts[:, f]) * np.uint64(0x9FB21C651E98DF25)
        h ^= h >> np.uint64(32)
    return h


def join_texts(texts: Sequence[str]) -> tuple[npt.NDArray[np.uint8], Ints]:
    """Strings as one buffer with offsets."""
    encoded = [t.encode() for t in texts]
    offsets = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(e) for e in encoded], out=offsets[1:])
    return np.frombuffer(b"".join(encoded), np.uint8), offsets
