"""The scan of files to shards: how often and from where a file is read, and what its shards say."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dedup_cases import lines_of, rows_of, texts

from fastsft.data import texts as texts_module
from fastsft.data.problems import Problems
from fastsft.data.scan import SketchOptions, scan
from fastsft.data.shards import Shards
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
