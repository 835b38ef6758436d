"""Rows of files as buffers of text with offsets, without a Python object per row where the rows are plain.

What a row means is said in one place, :func:`fastsft.data.records.interpret`. The short cuts here take only rows of
which it would say the same: JSON lines that :func:`fastsft.ops.jsonl_fields` decides, and Arrow columns of strings. All
others go through it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastsft import ops
from fastsft.data.compared import RowReader
from fastsft.data.problems import Problems
from fastsft.data.records import FIELDS, Kind, Record, parse_line
from fastsft.data.sources import Source
from fastsft.data.streams import DAMAGE, in_place, read_blocks
from fastsft.data.tables import of_table, read_tables
from fastsft.data.text_batch import OTHERS, PARTS, SEPARATORS, TextBatch, combine, digest_records
from fastsft.ops.jsonl import DECIDED, UNDECIDED, JsonlFields

Ints = npt.NDArray[np.int64]
Texts = tuple[npt.NDArray[np.uint8], Ints]
_NEAR = 1 << 14  # bytes between two lines that are sooner read than skipped


def read_texts(
    source: Source,
    problems: Problems,
    *,
    fields: Mapping[str, str] | None = None,
    batch_bytes: int = 1 << 24,
    start: tuple[int, int] = (0, 0),
) -> Iterator[TextBatch]:
    """The rows of a source from ``start``, the ``done`` of a batch, on. A batch is valid until the next is asked for.

    Raises:
        DataError: an unusable row where ``problems`` says so; a file that is not what its name says.
    """
    rows = RowReader(problems, fields or {}, source.on, source.score)
    number, position = start
    if source.kind == "lines":
        reader = _LineReader(source.path, rows)
        try:
            for block in read_blocks(source.path, batch_bytes, start=position):
                batch = reader.read(block, position, number)
                number, position = batch.done
                yield batch
        except DAMAGE as error:
            problems.add(str(source.path), "unreadable file", str(error))
        return
    for table in read_tables(source, problems, start=position):
        yield of_table(table, source.path, rows, position)
        position += table.num_rows


def reread_texts(
    source: Source, starts: Ints, sizes: Ints, *, fields: Mapping[str, str] | None = None, batch_bytes: int = 1 << 24
) -> Iterator[TextBatch]:
    """The given rows again, by ascending ``starts`` as they once came out of :func:`read_texts`.

    Rows that are usable no longer, because the file changed, are missing: compare the digests. Scores are not read.
    """
    problems = Problems("skip")
    rows = RowReader(problems, fields or {}, source.on)
    if source.kind == "lines":
        reader = _LineReader(source.path, rows)
        try:
            for block in pick_lines(source.path, starts, sizes, batch_bytes):
                yield reader.read(memoryview(block), 0, 0)
        except DAMAGE:  # it was whole before
            return
        return
    position = 0
    for table in read_tables(source, problems, rows=starts):
        begin, end = np.searchsorted(starts, [position, position + table.num_rows])
        position += table.num_rows
        if end > begin:
            yield of_table(table.take(starts[begin:end] - position + table.num_rows), source.path, rows, 0)


class _LineReader:
    """Reads blocks of whole lines of one file; keeps the room for their texts."""

    def __init__(self, path: Path, rows: RowReader) -> None:
        self._path, self._rows = path, rows
        self._room = np.empty(0, np.uint8)
        self._kind: Kind | None = None

    def read(self, block: memoryview, position: int, number: int) -> TextBatch:
        """``position`` and ``number``: bytes and lines of the file before the block."""
        data = np.frombuffer(block, np.uint8)
        if len(self._room) < len(data):
            self._room = np.empty(len(data), np.uint8)
        kind = self._kind = self._kind or self._guess(block)
        parts, separator, left_out = self._parts(kind)
        names = [self._rows.fields.get(n, n) for n in parts]
        rated = not self._rows.fields.keys().isdisjoint(("weight", "skills")) or self._rows.score is not None
        if rated or left_out == len(parts) or len(set(names)) < len(names):
            # Every row must have a number that is checked, lacks what is compared, or has one field twice: none is
            # decided, since none has these names.
            names = [f"\0{n}" for n in parts]
        found = ops.jsonl_fields(data, names, without=self._unwanted(names), separator=separator, out=self._room)
        n, width = len(found.status), len(names)
        usable = found.status == DECIDED
        scores = np.ones(n)
        hard = np.flatnonzero(found.status == UNDECIDED)
        texts = _last_fields(found, width, left_out)
        if self._rows.on is None:
            digests = combine(kind, ops.text_digests((found.text, found.offsets)).reshape(n, width, 2))
        read = self._parsed(block, found.lines, hard, number)
        if read:
            places = [i for i, *_ in read]
            texts = _inserted(texts, places, [text for _, _, text, _ in read])
            scores[places] = [score for *_, score in read]
            usable[places] = True
            if self._rows.on is None:
                digests[places] = digest_records([record for _, record, _, _ in read])
        if self._rows.on is not None:
            digests = ops.text_digests(texts)
        rows = np.flatnonzero(usable)
        # rows that are not usable have no text, so that the others' texts lie one behind the other
        return TextBatch(
            (texts[0], np.append(texts[1][rows], texts[1][-1])),
            digests[rows],
            number + rows + 1,
            position + found.lines[rows],
            np.diff(found.lines)[rows],
            scores[rows],
            (number + n, position + len(data)),
        )

    def _parts(self, kind: Kind) -> tuple[Sequence[str], str, int]:
        """The fields of a row in the order in which to read them, what joins them, and how many of the first are not
        compared: those compared come last, as nothing is put behind the last of all."""
        on = self._rows.on
        if on is None:
            return PARTS[kind], SEPARATORS[kind], 0
        return sorted(FIELDS[kind], key=on.__contains__), "\n", sum(n not in on for n in FIELDS[kind])

    def _parsed(self, block: memoryview, lines: Ints, hard: Ints, number: int) -> list[tuple[int, Record, str, float]]:
        """The full parser on the lines ``hard``: place, record, text and score of those that are usable."""
        read = []
        for i in hard.tolist():
            line = bytes(block[lines[i] : lines[i + 1]])
            row = parse_line(self._path, number + i + 1, line, self._rows.problems)
            found = self._rows.read(row) if row is not None else None
            if found is not None:
                read.append((i, *found))
        return read

    def _guess(self, block: memoryview) -> Kind:
        """The format of the first usable row; a wrong guess costs time only."""
        rows = replace(self._rows, problems=Problems("skip"))
        for number, line in enumerate(bytes(block[: 1 << 20]).split(b"\n")[:50]):
            row = parse_line(self._path, number, line, rows.problems)
            found = rows.read(row) if row is not None else None
            if found is not None and found[0].kind in PARTS:
                return found[0].kind
        return "text"

    def _unwanted(self, names: Sequence[str]) -> list[str]:
        """Fields that make a row one of another format, or with a weight or skills."""
        every = {self._rows.fields.get(n, n) for fields in FIELDS.values() for n in fields}
        return sorted((every | OTHERS) - set(names))


def _last_fields(found: JsonlFields, width: int, left_out: int) -> Texts:
    """The texts of lines without their first fields."""
    if not left_out:
        return found.text, np.ascontiguousarray(found.offsets[::width])
    sizes = np.diff(found.offsets)
    taken = np.tile(np.arange(width) >= left_out, len(found.status))
    ends = np.cumsum(sizes.reshape(-1, width)[:, left_out:].sum(axis=1))
    return found.text[np.repeat(taken, sizes)], np.append(0, ends)


def _inserted(texts: Texts, places: Sequence[int], values: Sequence[str]) -> Texts:
    """With other texts at places that had none."""
    pieces: list[npt.NDArray[np.uint8]] = []
    lengths = np.diff(texts[1])
    done = 0
    for i, value in zip(places, values, strict=True):
        text = np.frombuffer(value.encode(), np.uint8)
        pieces += [texts[0][done : texts[1][i]], text]
        done = int(texts[1][i])
        lengths[i] = len(text)
    return np.concatenate([*pieces, texts[0][done:]]), np.append(0, np.cumsum(lengths))


def pick_lines(path: Path, starts: Ints, sizes: Ints, size: int) -> Iterator[bytes]:
    """The bytes of the given lines, in blocks of about ``size``; a last line that lacks its newline gets one."""
    ends = starts + sizes
    if not in_place(path):
        position = 0
        for block in read_blocks(path, size):
            inside = slice(*np.searchsorted(starts, [position, position + len(block)]))
            places = zip((starts[inside] - position).tolist(), (ends[inside] - position).tolist(), strict=True)
            yield _ended(b"".join([bytes(block[begin:end]) for begin, end in places]))
            position += len(block)
        return
    block_ends = starts[1:] // size != starts[:-1] // size
    runs = np.append(True, (starts[1:] != ends[:-1]) | block_ends)[: len(starts)]  # of lines one behind the other
    starts, ends = starts[runs], ends[np.append(runs[1:], True)[: len(ends)]]
    block_ends = starts[1:] // size != starts[:-1] // size
    calls = np.append(True, (starts[1:] - ends[:-1] > _NEAR) | block_ends)[: len(starts)]
    cuts = [*np.flatnonzero(calls).tolist(), len(starts)]
    begins, limits = starts.tolist(), ends.tolist()
    with open(path, "rb", buffering=0) as stream:
        held: list[bytes] = []
        total = 0
        for i, j in itertools.pairwise(cuts):
            first = begins[i]
            read = memoryview(_read(stream.fileno(), first, limits[j - 1]))
            places = zip(begins[i:j], limits[i:j], strict=True)
            held.append(b"".join([read[begin - first : end - first] for begin, end in places]))
            total += len(held[-1])
            if total >= size:
                yield _ended(b"".join(held))
                held, total = [], 0
        yield _ended(b"".join(held))


def _read(file: int, begin: int, end: int) -> bytes:
    """The bytes of a file between two places: one call returns at most 2 GiB."""
    pieces = []
    while begin < end and (piece := os.pread(file, end - begin, begin)):
        pieces.append(piece)
        begin += len(piece)
    return b"".join(pieces)


def _ended(lines: bytes) -> bytes:
    return lines if lines.endswith(b"\n") or not lines else lines + b"\n"
