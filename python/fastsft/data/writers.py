"""Some rows of files, written as they were: the same format, and of lines and items of lists the same bytes."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastsft.data.lock import hold
from fastsft.data.problems import DataError, Problems
from fastsft.data.sources import Source, is_dataset, open_dataset, open_parquet
from fastsft.data.streams import LINE_ENDINGS, create_lines, holds_list
from fastsft.data.tables import read_tables
from fastsft.data.texts import pick_lines
from fastsft.files import sync, sync_tree

Ints = npt.NDArray[np.int64]


def check_target(sources: list[Source], target: Path, *, folder: bool, ours: bool) -> None:
    """Refuse, before any work is done, a target that cannot take what is read. ``folder``: of files of the same names;
    ``ours``: what an interrupted run of the same plan wrote may be there.

    Raises:
        DataError: naming what was expected.
    """
    kinds = {s.kind for s in sources}
    if folder or kinds == {"dataset"}:
        if target.exists() and not ours:
            raise DataError(f"{target}: expected the name of a new folder, got one that exists")
        names = [s.path.name for s in sources]
        if folder and len(set(names)) != len(names):
            raise DataError(f"{target}: expected files of different names, got twice {_twice(names)}")
        return
    endings = LINE_ENDINGS if kinds == {"lines"} else (".parquet",)
    if target.is_dir():
        raise DataError(f"{target}: expected a file, got a folder")
    if not target.name.endswith(endings):
        raise DataError(f"{target}: expected a name ending in {', '.join(endings)}, as rows keep their format")


def _twice(names: list[str]) -> str:
    return next(name for i, name in enumerate(names) if name in names[:i])


class Output:
    """Where the rows of several sources go: nothing has its name before all of it is on disk.

    Raises:
        ConfigError: another process is writing the same target.
    """

    def __init__(self, target: Path, *, folder: bool) -> None:
        self._target, self._folder = target, folder
        self._room = target.with_name(f".tmp-{target.name}")
        self._stage = self._room / target.name  # of the same ending, which says how it is compressed
        self._lock = ExitStack()
        self._lock.enter_context(hold(self._room, "output"))
        _remove(self._stage)  # an interrupted run's
        if folder:
            self._stage.mkdir()

    def write(self, source: Source, starts: Ints, sizes: Ints, *, batch_bytes: int = 1 << 22) -> None:
        """The rows of a source at ``starts``, which ascend, as :class:`fastsft.data.text_batch.TextBatch` has them."""
        path = self._stage / source.path.name if self._folder else self._stage
        with ExitStack() as failed:
            failed.callback(self._lock.close)
            if source.kind == "lines":
                with create_lines(path, listed=holds_list(source.path)) as stream:
                    for block in pick_lines(source.path, starts, sizes, batch_bytes):
                        stream.write(block)
            elif source.kind == "parquet":
                _write_parquet(source, starts, path)
            else:
                _write_dataset(source, starts, path)
            failed.pop_all()

    def finish(self) -> None:
        with self._lock:
            if self._stage.is_dir():
                sync_tree(self._stage)
            else:
                sync(self._stage)
            if self._target.is_dir():
                shutil.rmtree(self._target)
            self._stage.replace(self._target)
            sync(self._target.parent)
            shutil.rmtree(self._room)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_parquet(source: Source, rows: Ints, path: Path) -> None:
    """Row group by row group, with the file's schema and compression."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = open_parquet(source.path)
    counts = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    ends = np.cumsum([0, *counts])
    first = file.metadata.row_group(0) if counts else None
    compression = first.column(0).compression if first and first.num_columns else "snappy"
    compression = "none" if compression == "UNCOMPRESSED" else compression  # as the format names it, not as the writer
    with pq.ParquetWriter(path, file.schema_arrow, compression=compression) as writer:
        held: list[pa.Table] = []
        group, position = 0, 0

        def flush() -> None:
            if any(len(t) for t in held):
                table = pa.concat_tables(held)
                writer.write_table(table, row_group_size=len(table))
            held.clear()

        for table in read_tables(source, Problems("fail")):
            if position >= ends[group + 1]:
                flush()
                group += 1
            begin, end = np.searchsorted(rows, [position, position + len(table)])
            held.append(table.take(rows[begin:end] - position))
            position += len(table)
        flush()


def _write_dataset(source: Source, rows: Ints, path: Path) -> None:
    import datasets
    from datasets.utils import are_progress_bars_disabled

    shown = not are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        open_dataset(source.path).select(rows).save_to_disk(str(path))
    finally:
        if shown:
            datasets.enable_progress_bars()
    if not is_dataset(path):
        raise DataError(f"{path}: datasets wrote something else than a dataset")
