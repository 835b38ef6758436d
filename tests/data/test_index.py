"""The persistent index: files added one after another against all of them at once; killed, misused, damaged."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from dedup_cases import lines_of, rows_of, texts

from fastsft import ops
from fastsft.config import ConfigError
from fastsft.data.dedup import DedupReport
from fastsft.data.index import dedup_with_index
from fastsft.data.link import LinkOptions
from fastsft.data.lock import hold
from fastsft.data.problems import DataError, Problems
from fastsft.data.records import read_records
from fastsft.data.scan import SketchOptions


def add(index: Path, path: Path, output: Path | None = None, verify: Literal["exact", "signature"] = "exact",
        **options: Any) -> DedupReport:  # fmt: skip
    sketch = SketchOptions(**options)
    return dedup_with_index([path], output, Problems("fail"), index, sketch=sketch, how=LinkOptions(verify))


def parts(folder: Path, all_texts: list[str], cuts: list[int]) -> list[Path]:
    paths = []
    for i, (a, b) in enumerate(zip([0, *cuts], [*cuts, len(all_texts)], strict=True)):
        paths.append(folder / f"part{i}.jsonl")
        paths[-1].write_bytes(lines_of(rows_of(all_texts[a:b])))
    return paths


@pytest.mark.parametrize("verify", ["exact", "signature"])
def test_one_after_another_is_all_at_once(verify: Literal["exact", "signature"], tmp_path: Path) -> None:
    all_texts = texts(2400)
    expected = ops.near_duplicates(all_texts)
    if verify == "signature":
        expected = ops.lsh_clusters(ops.minhash_signatures(all_texts), threshold=0.7)
    begin = 0
    for i, path in enumerate(parts(tmp_path, all_texts, [1000, 1001, 1001, 1700])):
        output = tmp_path / f"out{i}.jsonl"
        report = add(tmp_path / "index", path, output, verify)
        n = len(report.keep)
        now = expected[begin : begin + n]
        # what is kept: rows without an earlier row in their cluster, as far as earlier rows connect it
        so_far = ops.near_duplicates(all_texts[: begin + n])[begin:] if verify == "exact" else None
        if so_far is not None:
            assert np.array_equal(report.labels + begin, so_far)
            assert np.array_equal(report.keep, so_far == np.arange(begin, begin + n))
        else:
            assert np.all(report.labels + begin >= now)
        kept = [r.parts[0] for r in read_records([output], Problems("fail"))] if n else []
        assert kept == [t for t, k in zip(all_texts[begin:], report.keep, strict=False) if k]
        begin += n
    labels = sorted((tmp_path / "index").glob("labels-*.bin"))
    assert len(labels) == 1
    assert np.array_equal(np.fromfile(labels[0], np.int64), expected)
    size = sum(p.stat().st_size for p in (tmp_path / "index").rglob("*") if p.is_file())
    assert size / len(all_texts) <= 800


def test_what_the_index_refuses(tmp_path: Path) -> None:
    first, second = parts(tmp_path, texts(400), [200])
    index = tmp_path / "index"
    add(index, first)
    with pytest.raises(DataError, match=r"is in the index .* already"):
        add(index, first)
    with pytest.raises(DataError, match=r"made with threshold = 0\.7, got 0\.8"):
        add(index, second, threshold=0.8)
    with hold(index, "index"), pytest.raises(ConfigError, match=r"index: .* is in use"):
        add(index, second)
    with pytest.raises(ValueError, match="max_cluster"):
        dedup_with_index(
            [second], None, Problems("fail"), index, sketch=SketchOptions(), how=LinkOptions(max_cluster=2)
        )


@pytest.mark.parametrize("change", ["gone", "changed"])
def test_an_earlier_file_that_is_not_what_it_was(change: str, tmp_path: Path) -> None:
    base = " ".join(f"w{i}" for i in range(50))
    first, second = parts(tmp_path, [base, "other", base + " more"], [2])
    index = tmp_path / "index"
    add(index, first)
    if change == "gone":
        first.unlink()
    else:
        first.write_bytes(first.read_bytes().replace(b"w1 ", b"v1 "))
    with pytest.raises(DataError, match=r"part0\.jsonl:1: changed .*--verify signature"):
        add(index, second)
    report = add(index, second, verify="signature")
    assert report.labels.tolist() == [-2]
    assert report.keep.tolist() == [False]


def test_files_with_other_field_names(tmp_path: Path) -> None:
    base = " ".join(f"w{i}" for i in range(50))
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_bytes(lines_of([{"content": base}]))
    second.write_bytes(lines_of(rows_of([base + " more", "other"])))
    add(tmp_path / "index", first, fields={"text": "content"})
    report = add(tmp_path / "index", second)
    assert report.labels.tolist() == [-1, 1]
    assert report.texts[0] == base + " more"


def test_killed_behind_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command then gives the same result once more; any other finds the files in the index."""
    from fastsft.data import index as module

    first, second, third = parts(tmp_path, texts(900), [300, 600])
    index, output = tmp_path / "index", tmp_path / "out.jsonl"
    add(index, first)
    shutil.copytree(index, tmp_path / "whole")
    expected = add(tmp_path / "whole", second, output)
    kept = output.read_bytes()
    output.unlink()

    def killed(*args: Any, **options: Any) -> None:
        commit(*args, **options)
        raise KeyboardInterrupt

    commit = module._commit
    with monkeypatch.context() as patch:
        patch.setattr(module, "_commit", killed)
        with pytest.raises(KeyboardInterrupt):
            add(index, second, output)
    with pytest.raises(DataError, match=r"part1\.jsonl: is in the index .* already"):
        add(index, second, tmp_path / "other.jsonl")
    report = add(index, second, output)
    assert np.array_equal(report.labels, expected.labels)
    assert np.array_equal(report.keep, expected.keep)
    assert (report.exact_duplicates, report.near_duplicates) == (expected.exact_duplicates, expected.near_duplicates)
    assert list(report.sources) == list(expected.sources)
    assert output.read_bytes() == kept
    assert contents(index) == contents(tmp_path / "whole")
    with pytest.raises(DataError, match=r"part1\.jsonl: is in the index .* already"):
        add(index, second, output)
    assert np.array_equal(add(index, third).labels, add(tmp_path / "whole", third).labels)


def contents(folder: Path) -> dict[Path, bytes]:
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


VICTIM = """
import sys
from pathlib import Path
from fastsft.data.index import dedup_with_index
from fastsft.data.link import LinkOptions
from fastsft.data.problems import Problems
from fastsft.data.scan import SketchOptions
print("begun", flush=True)
dedup_with_index([Path(sys.argv[2])], Path(sys.argv[3]), Problems("fail"), Path(sys.argv[1]), sketch=SketchOptions(),
                 how=LinkOptions(), memory=1 << 20)
"""


@pytest.mark.slow
def test_killed_while_adding(tmp_path: Path) -> None:
    all_texts = texts(9000)
    first, second = parts(tmp_path, all_texts, [3000])
    index, output = tmp_path / "index", tmp_path / "out.jsonl"
    add(index, first)
    command = [sys.executable, "-c", VICTIM, str(index), str(second), str(output)]
    rng = random.Random(1)
    for attempt in range(40):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        try:
            status = process.wait(rng.uniform(0, 0.1) + 0.01 * attempt**2)
            break
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            status = -9
            if "part1" in (index / "index.json").read_text():
                break  # it was through
    assert status == 0 or "part1" in (index / "index.json").read_text()
    expected = ops.near_duplicates(all_texts)
    labels = max(index.glob("labels-*.bin"))
    assert np.array_equal(np.fromfile(labels, np.int64), expected)
    kept = [r.parts[0] for r in read_records([output], Problems("fail"))]
    assert kept == [t for t, e, i in zip(all_texts, expected, range(9000), strict=True) if e == i and i >= 3000]
