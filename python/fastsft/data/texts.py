"""Rows of files as buffers of text with offsets, without a Python object per row where the rows are plain.

What a row means is said in one place, :func:`fastsft.data.records.interpret`. The short cuts here take only rows of
which it would say the same: JSON lines that :func:`fastsft.ops.jsonl_fields` decides, and Arrow columns of strings. All
others go through it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastsft import ops
from fastsft.data.records import FIELDS, Kind, Problems, Record, Row, interpret, parse_line
from fastsft.data.sources import Source, open_dataset, open_parquet
from fastsft.data.streams import DAMAGE, read_blocks
from fastsft.ops.jsonl import DECIDED, UNDECIDED

if TYPE_CHECKING:
    import pyarrow as pa

Ints = npt.NDArray[np.int64]

# The parts of a text in the order in which Record.text() joins them, and what stands between.
PARTS: dict[Kind, tuple[str, ...]] = {
    "text": ("text",),
    "prompt_completion": ("prompt", "completion"),
    "fim": ("prefix", "middle", "suffix"),
}
SEPARATORS: dict[Kind, str] = {"text": "", "prompt_completion": "\n", "fim": ""}
# Fields that make a row something else than its own format: its texts are then not to be taken as they stand.
_OTHERS = {"weight", "conversations", "instruction", "output"}
# Of a table: at most so many rows, and about so many bytes.
_TABLE_ROWS = 4096
_TABLE_BYTES = 1 << 24


@dataclass(frozen=True)
class TextBatch:
    """Consecutive usable rows of one file.

    Attributes:
        texts: uint8 [bytes] and int64 [n + 1]: ``Record.text()`` of each row, as UTF-8.
        digests: uint64 [n, 2]: equal for rows of equal content, which is all but the weight.
        numbers: int64 [n]: line or row, from 1.
        starts, sizes: int64 [n]: a line's bytes within the decompressed file; of tables the row from 0, and the text's
            length.
        done: rows and lines of the file behind this batch, and bytes (lines) or rows (tables).
    """

    texts: tuple[npt.NDArray[np.uint8], Ints]
    digests: npt.NDArray[np.uint64]
    numbers: Ints
    starts: Ints
    sizes: Ints
    done: tuple[int, int]

    def __len__(self) -> int:
        return len(self.numbers)


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
    names = dict(fields or {})
    number, position = start
    if source.kind == "lines":
        reader = _LineReader(source.path, problems, names)
        try:
            for block in read_blocks(source.path, batch_bytes, start=position):
                batch = reader.read(block, position, number)
                number, position = batch.done
                yield batch
        except DAMAGE as error:
            problems.add(str(source.path), "unreadable file", str(error))
        return
    for table in read_tables(source, problems, start=position):
        yield _of_table(table, source.path, problems, names, position)
        position += table.num_rows


def reread_texts(
    source: Source, starts: Ints, sizes: Ints, *, fields: Mapping[str, str] | None = None, batch_bytes: int = 1 << 24
) -> Iterator[TextBatch]:
    """The given rows again, by ascending ``starts`` as they once came out of :func:`read_texts`.

    Rows that are usable no longer, because the file changed, are missing: compare the digests.
    """
    problems = Problems("skip")
    names = dict(fields or {})
    if source.kind == "lines":
        reader = _LineReader(source.path, problems, names)
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
            yield _of_table(table.take(starts[begin:end] - position + table.num_rows), source.path, problems, names, 0)


def digest_records(records: Sequence[Record]) -> npt.NDArray[np.uint64]:
    """uint64 [n, 2], as in :class:`TextBatch`."""
    out = np.empty((len(records), 2), np.uint64)
    kinds = [r.kind for r in records]
    for kind in set(kinds):
        chosen = [i for i, k in enumerate(kinds) if k == kind]
        width = len(PARTS.get(kind, "x"))
        parts = [part for i in chosen for part in _parts(records[i])]
        out[chosen] = _combine(kind, ops.text_digests(parts).reshape(len(chosen), width, 2))
    return out


def _parts(record: Record) -> list[str]:
    """The texts that a digest is made of, separators included."""
    if record.kind not in PARTS:
        return [record.canonical().decode()]
    by_name = dict(zip(FIELDS[record.kind], record.parts, strict=True))
    names = PARTS[record.kind]
    return [by_name[n] + (SEPARATORS[record.kind] if n != names[-1] else "") for n in names]


def _combine(kind: Kind, parts: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """[n, F, 2] -> [n, 2]: each step is a bijection of either operand."""
    h = np.full((len(parts), 2), list(FIELDS).index(kind) + 1, np.uint64)
    for f in range(parts.shape[1]):
        h = (h ^ parts[:, f]) * np.uint64(0x9FB21C651E98DF25)
        h ^= h >> np.uint64(32)
    return h


class _LineReader:
    """Reads blocks of whole lines of one file; keeps the room for their texts."""

    def __init__(self, path: Path, problems: Problems, fields: dict[str, str]) -> None:
        self._path, self._problems, self._fields = path, problems, fields
        self._room = np.empty(0, np.uint8)
        self._kind: Kind | None = None

    def read(self, block: memoryview, position: int, number: int) -> TextBatch:
        """``position`` and ``number``: bytes and lines of the file before the block."""
        data = np.frombuffer(block, np.uint8)
        if len(self._room) < len(data):
            self._room = np.empty(len(data), np.uint8)
        kind = self._kind = self._kind or self._guess(block)
        names = [self._fields.get(n, n) for n in PARTS[kind]]
        if "weight" in self._fields or len(set(names)) < len(names):
            # Every row must have a weight that is checked, or has one field twice: none is decided, since none has
            # these names.
            names = [f"\0{n}" for n in PARTS[kind]]
        found = ops.jsonl_fields(
            data, names, without=self._unwanted(names), separator=SEPARATORS[kind], out=self._room
        )  # fmt: skip
        n, width = len(found.status), len(names)
        offsets = found.offsets[::width]
        digests = _combine(kind, ops.text_digests((found.text, found.offsets)).reshape(n, width, 2))
        texts = (found.text, offsets)
        usable = found.status == DECIDED
        hard = np.flatnonzero(found.status == UNDECIDED)
        if len(hard):
            texts = self._interpret(block, found.lines, hard, number, texts, digests, usable)
        rows = np.flatnonzero(usable)
        # rows that are not usable have no text, so that the others' texts lie one behind the other
        return TextBatch(
            (texts[0], np.append(texts[1][rows], texts[1][-1])),
            digests[rows],
            number + rows + 1,
            position + found.lines[rows],
            np.diff(found.lines)[rows],
            (number + n, position + len(data)),
        )

    def _interpret(
        self, block: memoryview, lines: Ints, hard: Ints, number: int,
        texts: tuple[npt.NDArray[np.uint8], Ints], digests: npt.NDArray[np.uint64], usable: npt.NDArray[np.bool_],
    ) -> tuple[npt.NDArray[np.uint8], Ints]:  # fmt: skip
        """The full parser on the lines ``hard``: their digests and usability in place, the texts with theirs put in."""
        records: list[Record] = []
        places: list[int] = []
        pieces: list[Any] = []
        lengths = np.diff(texts[1])
        done = 0
        for i in hard.tolist():
            row = parse_line(self._path, number + i + 1, bytes(block[lines[i] : lines[i + 1]]), self._problems)
            record = interpret(row, self._problems, format="auto", fields=self._fields) if row is not None else None
            if record is None:
                continue
            text = np.frombuffer(record.text().encode(), np.uint8)
            pieces += [texts[0][done : texts[1][i]], text]
            done = int(texts[1][i])
            lengths[i] = len(text)
            records.append(record)
            places.append(i)
        if records:
            digests[places] = digest_records(records)
            usable[places] = True
        return np.concatenate([*pieces, texts[0][done:]]), np.concatenate([[0], np.cumsum(lengths)])

    def _guess(self, block: memoryview) -> Kind:
        """The format of the first usable row; a wrong guess costs time only."""
        for number, line in enumerate(bytes(block[: 1 << 20]).split(b"\n")[:50]):
            row = parse_line(self._path, number, line, Problems("skip"))
            record = interpret(row, Problems("skip"), format="auto", fields=self._fields) if row is not None else None
            if record is not None and record.kind in PARTS:
                return record.kind
        return "text"

    def _unwanted(self, names: Sequence[str]) -> list[str]:
        """Fields that make a row one of another format, or weighted."""
        every = {self._fields.get(n, n) for fields in FIELDS.values() for n in fields}
        return sorted((every | _OTHERS) - set(names))


def pick_lines(path: Path, starts: Ints, sizes: Ints, size: int) -> Iterator[bytes]:
    """The bytes of the given lines, in blocks of about ``size``; a last line that lacks its newline gets one."""
    ends = starts + sizes
    if path.suffix in (".gz", ".zst"):
        position = 0
        for block in read_blocks(path, size):
            inside = slice(*np.searchsorted(starts, [position, position + len(block)]))
            places = zip((starts[inside] - position).tolist(), (ends[inside] - position).tolist(), strict=True)
            yield _ended(b"".join([bytes(block[begin:end]) for begin, end in places]))
            position += len(block)
        return
    # lines that lie one behind the other are read at once
    first = np.append(True, (starts[1:] != ends[:-1]) | (starts[1:] // size != starts[:-1] // size))[: len(starts)]
    starts, ends = starts[first], ends[np.append(first[1:], True)[: len(ends)]]
    with open(path, "rb") as stream:
        held: list[bytes] = []
        total = 0
        for begin, end in zip(starts.tolist(), ends.tolist(), strict=True):
            held.append(_read(stream.fileno(), begin, end))
            total += end - begin
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


def read_tables(source: Source, problems: Problems, *, start: int = 0, rows: Ints | None = None) -> Iterator[pa.Table]:
    """The rows of a Parquet file or dataset from ``start`` on, as Arrow tables of some thousand rows, fewer if these
    are large. With ``rows``, tables without any of these need not hold what the file does."""
    import pyarrow as pa

    if source.kind == "dataset":
        dataset = open_dataset(source.path).with_format("arrow")
        step = _table_rows(dataset.data.nbytes, dataset.data.num_rows)
        for begin in range(start, len(dataset), step):
            yield dataset[begin : begin + step]
        return
    file = open_parquet(source.path)
    position = 0
    try:
        for group in range(file.num_row_groups):
            about = file.metadata.row_group(group)
            count, step = about.num_rows, _table_rows(about.total_byte_size, about.num_rows)
            begin = max(start - position, 0)
            if begin < count:
                read = 0
                for batch in file.iter_batches(batch_size=step, row_groups=[group]):
                    if read + batch.num_rows > begin:
                        yield pa.Table.from_batches([batch.slice(max(begin - read, 0))])
                    read += batch.num_rows
            position += count
    except (pa.ArrowException, OSError) as error:  # a damaged page
        problems.add(str(source.path), "unreadable file", str(error))


def _table_rows(size: int, rows: int) -> int:
    """Of which a table is made, where ``rows`` have ``size`` bytes."""
    return min(_TABLE_ROWS, max(1, _TABLE_BYTES * rows // max(size, 1)))


def _of_table(table: pa.Table, path: Path, problems: Problems, fields: dict[str, str], position: int) -> TextBatch:
    """Rows ``position`` and on of a Parquet file or dataset."""
    columns = _string_columns(table, fields)
    n = table.num_rows
    rows = np.arange(n)
    if columns is not None:
        kind, parts = columns
        digests = _combine(kind, np.stack([ops.text_digests(_arena(p)) for p in parts], axis=1))
        texts = _arena(_joined(parts))
    else:
        found = [
            (i, interpret(Row(f"{path}:{position + i + 1}", value), problems, format="auto", fields=fields))
            for i, value in _values(table, path, problems, position)
        ]
        records = [(i, r) for i, r in found if r is not None]
        rows = np.array([i for i, _ in records], np.int64)
        digests = digest_records([r for _, r in records])
        texts = join_texts([r.text() for _, r in records])
    return TextBatch(
        texts, digests, position + rows + 1, position + rows, np.diff(texts[1]), (position + n, position + n)
    )


def _values(table: pa.Table, path: Path, problems: Problems, position: int) -> Iterator[tuple[int, Any]]:
    for i in range(table.num_rows):
        try:
            yield i, table.slice(i, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            problems.add(f"{path}:{position + i + 1}", "invalid UTF-8", f"byte {error.start}: {error.reason}")


def _string_columns(table: pa.Table, fields: dict[str, str]) -> tuple[Kind, list[pa.Array]] | None:
    """The format of all rows and its parts with their separators, where these are whole columns of strings."""
    import pyarrow as pa
    import pyarrow.compute as pc

    names = set(table.column_names)
    if names & _OTHERS or "weight" in fields:
        return None
    kind = next((k for k, parts in FIELDS.items() if all(fields.get(p, p) in names for p in parts)), None)
    if kind not in PARTS:
        return None
    parts = []
    for name in PARTS[kind]:
        column = table[fields.get(name, name)]
        if column.null_count or not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            return None
        column = column.cast(pa.large_string()).combine_chunks()
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:  # not UTF-8
            return None
        if SEPARATORS[kind] and name != PARTS[kind][-1]:
            end = pa.scalar(SEPARATORS[kind], pa.large_string())
            column = pc.binary_join_element_wise(column, end, pa.scalar("", pa.large_string()))
        parts.append(column)
    return kind, parts


def _joined(parts: list[pa.Array]) -> pa.Array:
    import pyarrow as pa
    import pyarrow.compute as pc

    return parts[0] if len(parts) == 1 else pc.binary_join_element_wise(*parts, pa.scalar("", pa.large_string()))


def _arena(column: pa.Array) -> tuple[npt.NDArray[np.uint8], Ints]:
    """The buffers of a large_string array, not copied."""
    _, offsets, data = column.buffers()
    ends = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
    return np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8), ends


def join_texts(texts: Sequence[str]) -> tuple[npt.NDArray[np.uint8], Ints]:
    """Strings as one buffer with offsets."""
    encoded = [t.encode() for t in texts]
    offsets = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(e) for e in encoded], out=offsets[1:])
    return np.frombuffer(b"".join(encoded), np.uint8), offsets
