"""Which files a path stands for, and how each is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastsft.data.problems import DataError
from fastsft.data.streams import LINE_ENDINGS, holds_list

_ENDINGS = ", ".join((*LINE_ENDINGS, ".parquet"))


@dataclass(frozen=True)
class Source:
    """One file, or one folder written by ``Dataset.save_to_disk``.

    ``fields``: our names and its own, of a file read in an earlier run; None: those of this run.
    ``on``: names of what is compared of its rows, see :func:`fastsft.data.compared.text_of`; None: all of them.
    ``score``: the field that rates a row; None: its weight does.
    """

    path: Path
    kind: Literal["lines", "parquet", "dataset"]
    fields: Mapping[str, str] | None = None
    on: tuple[str, ...] | None = None
    score: str | None = None


def find_sources(path: str | os.PathLike[str]) -> list[Source]:
    """A path is a file, a saved dataset, or a folder of files: in name order, without hidden ones, and of the names in
    ``.json`` those with a list, since the others are settings as a rule.

    Raises:
        DataError: there is no such path, or nothing in it that can be read.
    """
    where = Path(path)
    if not where.exists():
        raise DataError(f"{where}: no such file or folder")
    if not where.is_dir():
        source = _file(where)
        if source is None:
            raise DataError(f"{where}: expected a name ending in {_ENDINGS}, or a datasets folder")
        return [source]
    if is_dataset(where):
        return [Source(where, "dataset")]
    if (where / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(p.name for p in where.iterdir() if p.is_dir()))
        raise DataError(f"{where}: a dataset with several splits; name one of them: {splits}")
    shown = sorted(p for p in where.iterdir() if not p.name.startswith("."))  # others are half written, perhaps
    files = [s for p in shown if (p.suffix != ".json" or holds_list(p)) and (s := _file(p)) is not None]
    if not files:
        raise DataError(f"{where}: not a saved dataset, and no file in it ends in {_ENDINGS}")
    return files


def _file(path: Path) -> Source | None:
    if path.name.endswith(LINE_ENDINGS):
        return Source(path, "lines")
    return Source(path, "parquet") if path.suffix == ".parquet" else None


def is_dataset(folder: Path) -> bool:
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def open_parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a Parquet file: {error}") from error


def open_dataset(path: Path) -> Any:
    import datasets

    return datasets.load_from_disk(str(path))
