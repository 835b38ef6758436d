"""Deduplication of files against the same texts in memory: any format, any limit of memory, interrupted anywhere."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dedup_cases import lines_of, rows_of, texts

from fastsft import ops
from fastsft.data.dedup import DedupReport, dedup
from fastsft.data.dedup_files import dedup_files
from fastsft.data.link import LinkOptions
from fastsft.data.problems import DataError, Problems
from fastsft.data.records import read_records
from fastsft.data.scan import SketchOptions


def run(paths: list[Path], output: Path | None = None, mode: str = "fail", **options: Any) -> DedupReport:
    sketch = SketchOptions(**options.pop("sketch", {}))
    how = LinkOptions(**options.pop("how", {}))
    return dedup_files(paths, output, Problems(mode), sketch=sketch, how=how, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("max_cluster", [None, 3])
@pytest.mark.parametrize("memory", [None, 1 << 22, 1 << 16])
def test_labels_are_those_in_memory(memory: int | None, max_cluster: int | None, tmp_path: Path) -> None:
    all_texts = texts(3000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(rows_of(all_texts)))
    expected = ops.near_duplicates(all_texts, max_cluster=max_cluster)
    assert 200 < (expected != np.arange(3000)).sum() < 2800
    report = run([path], how={"max_cluster": max_cluster}, memory=memory, work=tmp_path / "work" if memory else None)
    assert np.array_equal(report.labels, expected)
    assert np.array_equal(report.keep, expected == np.arange(3000))
    distinct = len(set(all_texts))
    assert report.exact_duplicates == 3000 - distinct
    assert report.near_duplicates == distinct - report.keep.sum()
    assert report.sources[7] == f"{path}:8"
    assert report.texts[11] == all_texts[11]
    assert not (tmp_path / "work").exists()


def test_a_bucket_larger_than_the_memory(tmp_path: Path) -> None:
    rng = random.Random(0)
    base = [f"w{i}" for i in range(400)]
    all_texts = [" ".join(w if rng.random() > 0.004 else f"x{rng.randrange(10**6)}" for w in base) for _ in range(200)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(rows_of(all_texts)))
    expected = ops.near_duplicates(all_texts)
    for memory in (1 << 14, 1 << 17):
        assert np.array_equal(run([path], memory=memory, work=tmp_path / "work").labels, expected)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_kept_lines_keep_their_bytes(suffix: str, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    lines = [
        b'{"text":   "spaces  kept",  "id": 1}\n',
        '{"text": "ü \\u00fc", "id": 2.50}\r\n'.encode(),
        b"\n",
        b'{"text":   "spaces  kept",  "id": 3}\n',
        b"{broken\n",
        b'{"messages": [{"role": "user", "content": "spaces"}]}\n',
        b'{"id": 1e3, "text": "last, without a newline"}',
    ]
    pack = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": lambda d: pa.compress(d, "zstd", asbytes=True)}
    source, target = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    source.write_bytes(pack[suffix](b"".join(lines)))
    problems = Problems("skip")
    report = dedup_files([source], target, problems, sketch=SketchOptions("exact"), how=LinkOptions())
    raw = target.read_bytes()
    unpack = {
        ".jsonl": bytes,
        ".jsonl.gz": gzip.decompress,
        ".jsonl.zst": lambda d: pa.input_stream(pa.BufferReader(d), compression="zstd").read(),
    }
    assert unpack[suffix](raw) == lines[0] + lines[1] + lines[5] + lines[6] + b"\n"
    assert problems.counts == {"broken JSON": 1}
    assert report.keep.tolist() == [True, True, False, True, True]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([source.name, target.name])


@pytest.mark.parametrize("memory", [None, 1 << 16])
def test_tables_keep_their_shape(memory: int | None, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    datasets = pytest.importorskip("datasets")
    import pyarrow.parquet as pq

    all_texts = texts(600)
    schema = pa.schema([("text", pa.string()), ("id", pa.int16())], metadata={"owner": "me"})
    table = pa.table({"text": all_texts, "id": list(range(600))}, schema=schema)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100, compression="zstd")
    work = tmp_path / "work" if memory else None
    report = run([tmp_path / "a.parquet"], tmp_path / "b.parquet", memory=memory, work=work)
    assert np.array_equal(report.labels, ops.near_duplicates(all_texts))
    found = pq.ParquetFile(tmp_path / "b.parquet")
    assert found.read().equals(table.filter(pa.array(report.keep)), check_metadata=True)
    assert found.metadata.num_row_groups == 6
    assert found.metadata.row_group(0).column(0).compression == "ZSTD"

    datasets.Dataset(table).save_to_disk(str(tmp_path / "a"))
    report = run([tmp_path / "a"], tmp_path / "b", memory=memory, work=work)
    assert np.array_equal(report.labels, ops.near_duplicates(all_texts))
    again = datasets.load_from_disk(str(tmp_path / "b"))
    assert again["id"][:] == np.flatnonzero(report.keep).tolist()


def test_a_folder_and_several_paths(tmp_path: Path) -> None:
    all_texts = texts(900)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(lines_of(rows_of(all_texts[:300])))
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(gzip.compress(lines_of(rows_of(all_texts[300:600]))))
    (tmp_path / "c.jsonl").write_bytes(lines_of(rows_of(all_texts[600:])))
    expected = ops.near_duplicates(all_texts) == np.arange(900)
    report = run([tmp_path / "in", tmp_path / "c.jsonl"], tmp_path / "out")
    assert np.array_equal(report.keep, expected)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.jsonl", "b.jsonl.gz", "c.jsonl"]
    kept = [r.parts[0] for r in read_records(sorted((tmp_path / "out").iterdir()), Problems("fail"))]
    assert kept == [t for t, k in zip(all_texts, expected, strict=True) if k]
    run([tmp_path / "in"], tmp_path / "out2")
    assert sorted(p.name for p in (tmp_path / "out2").iterdir()) == ["a.jsonl", "b.jsonl.gz"]
    for target, message in (("out", "new folder"), ("c.jsonl", "new folder")):
        with pytest.raises(DataError, match=message):
            run([tmp_path / "in"], tmp_path / target)
    with pytest.raises(DataError, match="rows keep their format"):
        run([tmp_path / "c.jsonl"], tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"twice c\.jsonl"):
        run([tmp_path / "c.jsonl"] * 2, tmp_path / "new")


def test_keep_the_longest(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(60)]
    variants = [words, [*words, "more"], words[:-1], [*words, "even", "more"]]
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(rows_of(["alone", *(" ".join(v) for v in variants)])))
    report = run([path], keep="longest")
    assert report.labels.tolist() == [0, 1, 1, 1, 1]
    assert report.keep.tolist() == [True, False, False, False, True]


def test_the_longest_has_the_most_characters(tmp_path: Path) -> None:
    """Not bytes; as :func:`fastsft.dedup` of the same records says."""
    words = " ".join(f"w{i}" for i in range(60))
    all_texts = [f"{words} {'é' * 6}", f"{words} {'e' * 8}", "", "😀 ü", f"{words} {'😀' * 8}"]
    path = tmp_path / "a.jsonl"
    path.write_bytes("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in all_texts).encode())
    expected = [False, True, True, True, False]
    for memory in (None, 1 << 16):
        report = run([path], keep="longest", memory=memory, work=tmp_path / "work" if memory else None)
        assert report.keep.tolist() == expected
    assert dedup(path, keep="longest").keep.tolist() == expected


def test_nothing_and_little(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for data, count in ((b"", 0), (b"\n\n", 0), (b'{"text": ""}\n{"text": "?"}\n{"text": "!"}', 3)):
        path.write_bytes(data)
        for memory in (None, 1 << 16):
            report = run([path], tmp_path / "o.jsonl", memory=memory, work=tmp_path / "work" if memory else None)
            assert len(report.keep) == count
            assert report.labels.tolist() == [0] * count  # texts without words are one
            assert report.to_dict()["kept"] == min(count, 1)


def test_a_file_that_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(rows_of(texts(500))))
    from fastsft.data import dedup_files as module

    def scan(*args: Any, **options: Any) -> Any:
        shards = original(*args, **options)
        path.write_bytes(path.read_bytes().replace(b"w1", b"v1"))
        return shards

    original = module.scan
    monkeypatch.setattr(module, "scan", scan)
    with pytest.raises(DataError, match=r"a\.jsonl:\d+: changed since it was read first"):
        run([path])


@pytest.mark.parametrize("first", ["skip", "fail"])
def test_taken_up_with_another_mind_about_bad_rows(first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of an interrupted run serves both modes: "fail" still fails, "skip" reads on from the bad row."""
    path, output, work = tmp_path / "a.jsonl", tmp_path / "out.jsonl", tmp_path / "work"
    lines = lines_of(rows_of(texts(2000))).splitlines(keepends=True)
    lines[1500] = b"{broken\n"
    path.write_bytes(b"".join(lines))
    from fastsft.data import dedup_files as module

    def killed(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "link", killed)
        with pytest.raises(KeyboardInterrupt if first == "skip" else DataError):
            run([path], output, first, memory=1 << 16, work=work)
    made = {p: p.stat().st_mtime_ns for p in work.glob("shards/*.shard")}
    assert made
    with pytest.raises(DataError, match=r"a\.jsonl:1501: "):
        run([path], output, "fail", memory=1 << 16, work=work)
    assert {p: p.stat().st_mtime_ns for p in made} == made
    report = run([path], output, "skip", memory=1 << 16, work=work)
    assert len(report.keep) == 1999
    assert report.sources[1500] == f"{path}:1502"


VICTIM = """
import sys
from pathlib import Path
from fastsft.data.dedup_files import dedup_files
from fastsft.data.link import LinkOptions
from fastsft.data.problems import Problems
from fastsft.data.scan import SketchOptions
print("begun", flush=True)
paths = [Path(p) for p in sys.argv[3:]]
dedup_files(paths, Path(sys.argv[1]), Problems("skip"), sketch=SketchOptions(), how=LinkOptions(),
            memory=1 << 19, work=Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_killed_at_any_instant(tmp_path: Path) -> None:
    """Killed again and again after a random time, each time later, until it gets through."""
    all_texts = texts(8_000)
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"]
    paths[0].write_bytes(lines_of(rows_of(all_texts[:5_000])) + b"{broken\n")
    paths[1].write_bytes(gzip.compress(lines_of(rows_of(all_texts[5_000:]))))
    output, work = tmp_path / "out", tmp_path / "work"
    command = [sys.executable, "-c", VICTIM, str(output), str(work), *map(str, paths)]
    rng = random.Random(0)
    killed = 0
    begun = time.monotonic()
    for attempt in range(60):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        limit = rng.uniform(0, 0.1) + 0.02 * attempt**2  # grows past what a busy machine needs
        try:
            assert process.wait(limit) == 0
            break
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
            if output.exists() and not (work / "plan.json").exists():
                break  # it was through
        assert time.monotonic() - begun < 240
    assert killed >= 3
    reference = tmp_path / "reference"
    problems = Problems("skip")
    expected = dedup_files(paths, reference, problems, sketch=SketchOptions(), how=LinkOptions())
    assert np.array_equal(expected.labels, ops.near_duplicates(all_texts))
    assert problems.counts == {"broken JSON": 1}
    for path in paths:
        assert (output / path.name).read_bytes() == (reference / path.name).read_bytes()
    assert not work.exists() or [p.name for p in work.iterdir()] == [".lock"]  # killed at the very end
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
