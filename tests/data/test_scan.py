"""The scan of files to shards: how often and from where a file is read, and what its shards say."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dedup_cases import lines_of, rows_of, texts

from fastsft.data import texts as texts_module
from fastsft.data.problems import Problems
from fastsft.data.scan import SketchOptions, scan
from fastsft.data.shards import Shard, Shards
from fastsft.data.sources import Source
from fastsft.data.streams import read_blocks

MEMORY = 1 << 16  # the least: a shard for each block


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where each reading of a file of lines begins."""
    found: list[int] = []

    def counted(path: Path, size: int, *, start: int = 0) -> Iterator[memoryview]:
        found.append(start)
        return read_blocks(path, size, start=start)

    monkeypatch.setattr(texts_module, "read_blocks", counted)
    return found


def scanned(path: Path, folder: Path | None, problems: Problems | None = None) -> Shards:
    sources = [Source(path, "lines")]
    return scan(sources, SketchOptions(mode="exact"), problems or Problems("skip"), folder=folder, memory=MEMORY)


def contents(shards: Shards) -> dict[str, Any]:
    return {name: shards.read(name).tolist() for name in ("digests", "numbers", "starts", "sizes", "lengths")}


def test_shards_of_one_file_come_from_one_reading(starts: list[int], tmp_path: Path) -> None:
    lines = lines_of(rows_of(texts(2000))).splitlines(keepends=True)
    lines[::400] = [b"{broken\n"] * 5
    path, folder = tmp_path / "a.jsonl.gz", tmp_path / "shards"
    path.write_bytes(gzip.compress(b"".join(lines)))
    folder.mkdir()
    once, problems = Problems("skip"), Problems("skip")
    expected = contents(scanned(path, None, once))
    assert len(expected["numbers"]) == 1995
    starts.clear()

    shards = scanned(path, folder, problems)
    assert len(shards.shards) >= 5
    assert starts == [0]
    assert contents(shards) == expected
    assert (problems.counts, problems.examples) == (once.counts, once.examples)
    assert sum(sum(s.info.skipped.values()) for s in shards.shards) == 5

    for left in sorted(folder.iterdir())[2:]:
        left.unlink()
    again = Problems("skip")
    assert contents(scanned(path, folder, again)) == expected
    assert starts == [0, shards.shards[1].info.done[1]]
    assert (again.counts, again.examples) == (once.counts, once.examples)


def test_many_files_are_not_searched_for_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One listing of the folder for all sources, and no walk through all shards for the rows of one."""
    listed: list[Path] = []
    glob = Path.glob

    def counted(folder: Path, pattern: str) -> Iterator[Path]:
        listed.append(folder)
        return glob(folder, pattern)

    monkeypatch.setattr(Path, "glob", counted)
    folder = tmp_path / "shards"
    folder.mkdir()
    sources = []
    for i in range(50):
        sources.append(Source(tmp_path / f"{i:02d}.jsonl", "lines"))
        sources[-1].path.write_bytes(lines_of(rows_of([f"text {i}"] * (i % 3))))
    shards = scan(sources, SketchOptions(mode="exact"), Problems("fail"), folder=folder, memory=MEMORY)
    assert listed == [folder]

    numbers = shards.read("numbers")
    looked_at: list[int] = []

    class Watched(list[Shard]):
        def __getitem__(self, at: Any) -> Any:
            looked_at.append(at)
            return super().__getitem__(at)

        def __iter__(self) -> Any:
            raise AssertionError("all of them")

    shards.shards = Watched(shards.shards)
    for i in range(50):
        span = shards.of_source(i)
        rows = np.arange(span.start, span.stop)
        assert len(rows) == i % 3
        if len(rows):
            assert np.array_equal(shards.chosen("numbers", rows), numbers[span])
            assert shards.source_of(span.start) == i
    assert len(looked_at) <= 100
    assert shards.of_source(50) == slice(49, 49)
