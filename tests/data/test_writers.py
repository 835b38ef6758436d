"""Rows written as they were: one process per target, and files that a writer cannot copy as they are named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastsft.config import ConfigError
from fastsft.data.records import Problems, read_records
from fastsft.data.sources import find_sources
from fastsft.data.texts import read_texts
from fastsft.data.writers import Output

OTHER = """
import sys
from pathlib import Path
from fastsft.data.writers import Output
output = Output(Path(sys.argv[1]), folder=False)
print("begun", flush=True)
input()
"""


def copy(source: Path, output: Output) -> None:
    (found,) = find_sources(source)
    (batch,) = read_texts(found, Problems("fail"))
    output.write(found, batch.starts, batch.sizes)
    output.finish()


def test_one_process_writes_a_target(tmp_path: Path) -> None:
    source, target = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"text": "a"}\n')
    command = [sys.executable, "-c", OTHER, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "begun\n"
        with pytest.raises(
            ConfigError, match=rf"output: .*out\.jsonl is in use by another run \(process {other.pid}\)"
        ):
            Output(target, folder=False)
        other.kill()
    copy(source, Output(target, folder=False))
    copy(source, Output(target, folder=False))
    assert target.read_bytes() == source.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out.jsonl"]


def test_a_failed_write_frees_its_target(tmp_path: Path) -> None:
    source, target = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"text": "a"}\n')
    (found,) = find_sources(source)
    output = Output(target, folder=False)
    source.rename(tmp_path / "b.jsonl")
    with pytest.raises(FileNotFoundError) as raised:
        output.write(found, np.array([0]), np.array([14]))
    copy(tmp_path / "b.jsonl", Output(target, folder=False))
    assert target.read_text() == '{"text": "a"}\n'
    assert raised.value.filename == str(source)


def test_what_a_killed_run_left_is_no_source(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(json.dumps({"text": "a"}) + "\n")
    (tmp_path / ".tmp-out.jsonl").write_text('{"text": "half')
    assert [s.path for s in find_sources(tmp_path)] == [source]
    assert [s.path for s in find_sources(tmp_path / ".tmp-out.jsonl")] == [tmp_path / ".tmp-out.jsonl"]


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "brotli", "zstd", "lz4"])
def test_compression_is_kept(compression: str, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "a.parquet", compression=compression)
    copy(tmp_path / "a.parquet", Output(tmp_path / "b.parquet", folder=False))
    assert [r.parts for r in read_records([tmp_path / "b.parquet"], Problems("fail"))] == [("a",), ("b",)]
    first, second = (
        pq.ParquetFile(tmp_path / f"{n}.parquet").metadata.row_group(0).column(0).compression for n in "ab"
    )
    assert first == second
