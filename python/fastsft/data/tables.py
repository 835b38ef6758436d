"""Rows of Parquet files and datasets as batches of text, by whole columns where these are strings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fastsft import ops
from fastsft.data.compared import RowReader
from fastsft.data.problems import Problems
from fastsft.data.records import FIELDS, Kind, Row, table_values
from fastsft.data.sources import Source, open_dataset, open_parquet
from fastsft.data.text_batch import OTHERS, PARTS, SEPARATORS, TextBatch, combine, digest_records, join_texts

if TYPE_CHECKING:
    import pyarrow as pa

Ints = npt.NDArray[np.int64]
# Of a table: at most so many rows, and about so many bytes.
_TABLE_ROWS = 4096
_TABLE_BYTES = 1 << 24


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


def of_table(table: pa.Table, path: Path, reader: RowReader, position: int) -> TextBatch:
    """Rows ``position`` and on of a Parquet file or dataset."""
    n = table.num_rows
    rows = np.arange(n)
    columns = _string_columns(table, reader)
    scores = _scores(table, reader.score)
    if columns is not None and scores is not None:
        kind, parts = columns
        texts = _arena(_joined(parts))
        if reader.on is None:
            digests = combine(kind, np.stack([ops.text_digests(_arena(p)) for p in parts], axis=1))
        else:
            digests = ops.text_digests(texts)
    else:
        read = [
            (i, *found)
            for i, value in table_values(table, path, position, reader.problems)
            if (found := reader.read(Row(f"{path}:{position + i + 1}", value))) is not None
        ]
        rows = np.array([i for i, *_ in read], np.int64)
        scores = np.array([score for *_, score in read], np.float64)
        texts = join_texts([text for _, _, text, _ in read])
        digests = digest_records([r for _, r, _, _ in read]) if reader.on is None else ops.text_digests(texts)
    return TextBatch(
        texts, digests, position + rows + 1, position + rows, np.diff(texts[1]), scores, (position + n, position + n)
    )


def _string_columns(table: pa.Table, reader: RowReader) -> tuple[Kind, list[pa.Array]] | None:
    """The format of all rows and its compared parts with their separators, where all parts are whole columns of
    strings."""
    import pyarrow as pa
    import pyarrow.compute as pc

    names = set(table.column_names)
    if names & OTHERS or not reader.fields.keys().isdisjoint(("weight", "skills")):
        return None
    of = {name: reader.fields.get(name, name) for fields in FIELDS.values() for name in fields}
    kind = next((k for k, parts in FIELDS.items() if all(of[p] in names for p in parts)), None)
    if kind not in PARTS:
        return None
    columns = {name: _strings(table[of[name]]) for name in FIELDS[kind]}
    if any(column is None for column in columns.values()):
        return None
    order, separator = PARTS[kind], SEPARATORS[kind]
    if reader.on is not None:
        order, separator = tuple(name for name in FIELDS[kind] if name in reader.on), "\n"
    if not order:
        return None
    if separator:
        end = pa.scalar(separator, pa.large_string())
        for name in order[:-1]:
            columns[name] = pc.binary_join_element_wise(columns[name], end, pa.scalar("", pa.large_string()))
    return kind, [columns[name] for name in order]


def _strings(column: pa.ChunkedArray) -> pa.Array | None:
    """A column of strings without a null, as one array."""
    import pyarrow as pa

    if column.null_count or not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return None
    whole = column.cast(pa.large_string()).combine_chunks()
    try:
        whole.validate(full=True)
    except pa.ArrowInvalid:  # not UTF-8
        return None
    return whole


def _scores(table: pa.Table, name: str | None) -> npt.NDArray[np.float64] | None:
    """A column of numbers without a null or NaN; of the weight, 1, as there is none where columns are taken whole."""
    import pyarrow as pa

    if name is None:
        return np.ones(table.num_rows)
    if table.column_names.count(name) != 1:
        return None
    column = table[name]
    if column.null_count or not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        return None
    scores = column.cast(pa.float64(), safe=False).to_numpy()
    return None if np.isnan(scores).any() else scores


def _joined(parts: list[pa.Array]) -> pa.Array:
    import pyarrow as pa
    import pyarrow.compute as pc

    return parts[0] if len(parts) == 1 else pc.binary_join_element_wise(*parts, pa.scalar("", pa.large_string()))


def _arena(column: pa.Array) -> tuple[npt.NDArray[np.uint8], Ints]:
    """The buffers of a large_string array, not copied."""
    _, offsets, data = column.buffers()
    ends = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
    return np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8), ends
