"""The texts of candidates for being near duplicates: read again from the files, or made of their signatures."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Literal

import numpy as np
import numpy.typing as npt

from fastsft.data.problems import DataError
from fastsft.data.scan import SketchOptions
from fastsft.data.shards import Shards
from fastsft.data.sources import Source
from fastsft.data.texts import reread_texts

Ints = npt.NDArray[np.int64]


class CandidateTexts:
    """The texts of some rows, which ascend: in memory, or in a temporary file where they do not fit."""

    def __init__(self, rows: Ints, *, in_file: bool, folder: Path | None) -> None:
        self.rows = rows
        self.offsets = np.zeros(1, np.int64)
        self._file: IO[bytes] | None = tempfile.TemporaryFile(dir=folder) if in_file else None  # noqa: SIM115
        self._pieces: list[npt.NDArray[np.uint8]] = []
        self._lengths: list[Ints] = []
        self._texts = np.empty(0, np.uint8)

    def append(self, data: npt.NDArray[np.uint8], lengths: Ints) -> None:
        if self._file is None:
            self._pieces.append(data.copy())
        else:
            self._file.write(data.data)
        self._lengths.append(lengths)

    def finish(self) -> CandidateTexts:
        self.offsets = np.cumsum(np.concatenate([[0], *self._lengths]))
        self._texts = np.concatenate([self._texts, *self._pieces])
        self._pieces.clear()
        self._lengths.clear()
        return self

    def take(self, rows: Ints) -> tuple[npt.NDArray[np.uint8], Ints]:
        """The texts of some of the rows, which ascend, as one buffer with offsets."""
        if not len(rows):
            return np.empty(0, np.uint8), np.zeros(1, np.int64)
        at = np.searchsorted(self.rows, rows)
        begins, ends = self.offsets[at], self.offsets[at + 1]
        pieces = []
        runs = np.flatnonzero(np.append(True, begins[1:] != ends[:-1]))
        for begin, end in zip(begins[runs].tolist(), ends[np.append(runs[1:], len(rows)) - 1].tolist(), strict=True):
            if self._file is None:
                pieces.append(self._texts[begin:end])
            else:
                self._file.seek(begin)
                pieces.append(np.frombuffer(self._file.read(end - begin), np.uint8))
        data = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return data, np.cumsum(np.append(0, ends - begins))

    def size(self, rows: Ints) -> Ints:
        at = np.searchsorted(self.rows, rows)
        sizes: Ints = self.offsets[at + 1] - self.offsets[at]
        return sizes


def candidate_texts(sources: Sequence[Source], shards: Shards, rows: Ints, options: SketchOptions, *,
                    memory: int, folder: Path | None) -> CandidateTexts:  # fmt: skip
    """The rows' texts, read again in one pass over the files.

    Raises:
        DataError: a row is not what it was.
    """
    texts = CandidateTexts(rows, in_file=int(shards.chosen("lengths", rows).sum()) > memory, folder=folder)
    for index, source in enumerate(sources):
        span = shards.of_source(index)
        mine = rows[np.searchsorted(rows, span.start) : np.searchsorted(rows, span.stop)]
        if not len(mine):
            continue
        digests = shards.chosen("digests", mine)
        starts, sizes = shards.chosen("starts", mine), shards.chosen("sizes", mine)
        batch_bytes = max(1 << 16, min(1 << 22, memory // 8))
        done = 0
        fields = options.fields if source.fields is None else source.fields
        if source.path.exists():
            for batch in reread_texts(source, starts, sizes, fields=fields, batch_bytes=batch_bytes):
                if not np.array_equal(batch.digests, digests[done : done + len(batch)]):
                    break
                data, offsets = batch.texts
                texts.append(data[offsets[0] : offsets[-1]], np.diff(offsets))
                done += len(batch)
        if done != len(mine):
            number = shards.chosen("numbers", mine[done : done + 1])[0]
            raise DataError(
                f"{source.path}:{number}: changed since it was read first; candidates cannot be compared exactly "
                "(--verify signature compares their signatures)"
            )
    return texts.finish()


def signature_texts(shards: Shards, rows: Ints, *, memory: int, folder: Path | None) -> CandidateTexts:
    """Signatures as texts of one word for each column and value: m equal columns of P are a Jaccard similarity of
    m / (2 P - m)."""
    num_perm = shards.shards[0].info.num_perm if shards.shards else 0
    width = 13
    texts = CandidateTexts(rows, in_file=len(rows) * num_perm * width > memory, folder=folder)
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    columns = np.arange(num_perm, dtype=">u2").view(np.uint8).reshape(num_perm, 2)
    step = max(1, min(memory, 1 << 26) // (8 * width * max(num_perm, 1)))
    for begin in range(0, len(rows), step):
        part = rows[begin : begin + step]
        values = shards.chosen("signatures", part).astype(">u4").view(np.uint8).reshape(len(part), num_perm, 4)
        words = np.full((len(part), num_perm, width), ord(" "), np.uint8)
        words[:, :, 0:4:2], words[:, :, 1:4:2] = digits[columns >> 4], digits[columns & 15]
        words[:, :, 4:12:2], words[:, :, 5:12:2] = digits[values >> 4], digits[values & 15]
        texts.append(words.reshape(-1), np.full(len(part), num_perm * width))
    return texts.finish()


def compared_texts(
    sources: Sequence[Source], shards: Shards, rows: Ints, options: SketchOptions,
    verify: Literal["exact", "signature"], *, memory: int, folder: Path | None,
) -> tuple[CandidateTexts, SketchOptions]:  # fmt: skip
    """What stands for the rows' texts where they are compared, and the options of that."""
    if verify == "exact":
        return candidate_texts(sources, shards, rows, options, memory=memory, folder=folder), options
    return signature_texts(shards, rows, memory=memory, folder=folder), for_signatures(options)


def for_signatures(options: SketchOptions) -> SketchOptions:
    """The options that compare :func:`signature_texts`; half a column is a margin for rounding."""
    needed = math.ceil(options.threshold * options.num_perm - 1e-9) - 0.5
    return dataclasses.replace(
        options, threshold=needed / (2 * options.num_perm - needed), ngram=1, unit="word", fields={}
    )  # fmt: skip
