"""Batches of texts against the records that the plain readers make of the same files."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastsft.data.problems import DataError, Problems
from fastsft.data.records import read_records
from fastsft.data.sources import find_sources
from fastsft.data.streams import read_blocks
from fastsft.data.text_batch import TextBatch, digest_records
from fastsft.data.texts import read_texts, reread_texts

CHAT = {"messages": [{"role": "user", "content": "q é"}, {"role": "assistant", "content": "a\n"}]}
ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": f"row {i} é\n\t\"x\"" * (i % 9), "id": i} for i in range(60)],
    "pairs": [{"completion": "c" * (i % 7), "id": i, "prompt": "p\n" * (i % 5)} for i in range(60)],
    "fim": [{"prefix": "a" * (i % 3), "suffix": "b" * (i % 2), "middle": "c\u2028" * (i % 4)} for i in range(60)],
    "messages": [CHAT | {"tools": [{"name": str(i % 3)}]} for i in range(12)],
    "weights": [{"text": f"t{i % 3}", "weight": 1 + i % 2} for i in range(12)],
    "alpaca": [{"instruction": "Add.", "input": f"{i % 4}", "output": "3"} for i in range(12)],
    "sharegpt": [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": str(i % 3)}]}
                 for i in range(9)],
    "none": [],
}  # fmt: skip
ROWS["mixed"] = [row for rows in zip(*(ROWS[k] for k in ("text", "pairs", "fim")), strict=True) for row in rows]
ROWS["mixed"] += ROWS["messages"] + ROWS["weights"] + ROWS["text"]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    data = "".join(json.dumps(r, ensure_ascii=i % 2 == 0) + "\n" * (1 + i % 3) for i, r in enumerate(rows)).encode()
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(data[:500]) + gzip.compress(data[500:]))
    elif path.name.endswith(".zst"):
        path.write_bytes(pa.compress(data, "zstd", asbytes=True))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    elif path.suffix == ".dataset":
        datasets = pytest.importorskip("datasets")
        table = datasets.Dataset.from_list(rows + rows)
        table.select(range(len(rows))).save_to_disk(str(path))
    else:
        path.write_bytes(data.rstrip(b"\n"))
    return path


def check(path: Path, batch_bytes: int = 300, fields: dict[str, str] | None = None) -> list[TextBatch]:
    """Texts, places and digests are those of the records; the same when read from the middle, and by place."""
    problems, expected_problems = Problems("skip"), Problems("skip")
    records = list(read_records([path], expected_problems, fields=fields))
    texts, places, digests, batches = [], [], [], []
    starts: list[tuple[int, int]] = [(0, 0)]
    sources = find_sources(path)
    assert len(sources) == 1
    for batch in read_texts(sources[0], problems, fields=fields, batch_bytes=batch_bytes):
        data, offsets = batch.texts
        assert len(offsets) == len(batch) + 1
        texts += [data[a:b].tobytes() for a, b in itertools.pairwise(offsets)]
        places += [f"{path}:{n}" for n in batch.numbers]
        digests += [d.tobytes() for d in batch.digests]
        batches.append(batch)
        starts.append(batch.done)
    assert texts == [r.text().encode() for r in records]
    assert places == [r.source for r in records]
    assert problems.counts == expected_problems.counts
    assert problems.examples == expected_problems.examples
    assert digests == [d.tobytes() for d in digest_records(records)]
    classes: dict[bytes, bytes] = {}
    assert all(classes.setdefault(r.canonical(), d) == d for r, d in zip(records, digests, strict=True))
    assert len(set(digests)) == len(classes)

    if len(starts) > 2:
        middle = starts[len(starts) // 2]
        rest = [d.tobytes() for b in read_texts(sources[0], Problems("skip"), fields=fields, start=middle)
                for d in b.digests]  # fmt: skip
        assert rest == digests[len(digests) - len(rest) :]
        assert rest or middle == starts[-1]
    rng = random.Random(len(records))
    chosen = sorted(rng.sample(range(len(records)), len(records) // 3))
    where = np.concatenate([b.starts for b in batches] or [np.empty(0, np.int64)])[chosen]
    sizes = np.concatenate([b.sizes for b in batches] or [np.empty(0, np.int64)])[chosen]
    again = [d.tobytes() for b in reread_texts(sources[0], where, sizes, fields=fields, batch_bytes=batch_bytes)
             for d in b.digests]  # fmt: skip
    assert again == [digests[i] for i in chosen]
    return batches


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_lines(kind: str, suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"a{suffix}", ROWS[kind])
    assert len(check(path)) > 2 or len(ROWS[kind]) < 60
    check(path, 1)
    check(path, 1 << 20)


@pytest.mark.parametrize("kind", [k for k in ROWS if k not in ("mixed", "none")])
@pytest.mark.parametrize("suffix", [".parquet", ".dataset"])
def test_tables(kind: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsft.data.tables._TABLE_ROWS", 10)
    check(write(tmp_path / f"a{suffix}", ROWS[kind]))


def test_tables_that_are_not_plain(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    for name, column in {
        "null": pa.array(["a", None, "b"]),
        "number": pa.array([1, 2, 3]),
        "large": pa.array(["a", "é", "a"], pa.large_string()),
        "dictionary": pa.array(["a", "b", "a"]).dictionary_encode(),
    }.items():
        pq.write_table(pa.table({"text": column}), tmp_path / f"{name}.parquet")
        check(tmp_path / f"{name}.parquet")
    bad = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(np.array([0, 1, 3], np.int32)), pa.py_buffer(b"a\xff\xfe")]
    )
    pq.write_table(pa.table({"text": bad}), tmp_path / "bad.parquet")
    problems = Problems("skip")
    (batch,) = read_texts(find_sources(tmp_path / "bad.parquet")[0], problems)
    assert len(batch) == 1
    assert problems.counts == {"invalid UTF-8": 1}
    assert problems.examples["invalid UTF-8"][0].startswith(f"{tmp_path / 'bad.parquet'}:2")


def test_other_names(tmp_path: Path) -> None:
    rows = [{"content": f"x{i % 3}", "text": i, "prompt": "p", "completion": "c"} for i in range(20)]
    check(write(tmp_path / "a.jsonl", rows), fields={"text": "content"})
    check(write(tmp_path / "a.parquet", rows), fields={"text": "content"})
    check(write(tmp_path / "b.jsonl", [{"a": "x", "b": "y"}] * 5), fields={"prompt": "a", "completion": "b"})


def test_one_field_for_two_parts(tmp_path: Path) -> None:
    rows = [{"q": f"x{i % 3}"} for i in range(9)]
    for name in ("a.jsonl", "a.parquet"):
        check(write(tmp_path / name, rows), fields={"prompt": "q", "completion": "q"})
        check(write(tmp_path / name, rows), fields={"prefix": "q", "suffix": "q", "middle": "q"})


def test_lines_that_one_read_does_not_return_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is with lines of 2 GiB."""
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda file, count, place: real(file, min(count, 7), place))
    check(write(tmp_path / "a.jsonl", ROWS["text"]))


def test_blocks_are_small_again_after_a_long_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [b"a" * 9 + b"\n"] * 50 + [b"b" * 5000 + b"\n"] + [b"c" * 9 + b"\n"] * 2000 + [b"d" * 300 + b"\n"] * 2
    path.write_bytes(b"".join(lines))
    blocks = [bytes(block) for block in read_blocks(path, 100)]
    assert b"".join(blocks) == path.read_bytes()
    long = next(i for i, block in enumerate(blocks) if b"b" in block)
    assert max(len(block) for i, block in enumerate(blocks[:-2]) if i != long) <= 100


@pytest.mark.parametrize("suffix", [".parquet", ".dataset"])
def test_tables_of_large_rows_have_few(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"{i:04d}" * 100} for i in range(40)]  # 400 bytes each
    path = write(tmp_path / f"a{suffix}", rows)
    monkeypatch.setattr("fastsft.data.tables._TABLE_BYTES", 1000)
    assert max(len(batch) for batch in check(path)) <= 3


def test_bad_rows(tmp_path: Path) -> None:
    lines = [
        b'{"text": "a"}',
        b"{broken",
        b"",
        b"\x0b",
        b'{"text": 1}',
        b'"text"',
        b'{"text": "\xff"}',
        b'{"text": "b"}',
        b"[]",
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines * 3))
    check(path, 1)
    check(path, 1 << 20)
    for count in range(1, 9):
        path.write_bytes(b"\n".join(lines[:count]))
        messages = []
        for read in (lambda p: list(read_records([path], p)), lambda p: list(read_texts(find_sources(path)[0], p))):
            try:
                read(Problems("fail"))
            except DataError as error:
                messages.append(str(error))
        assert len(messages) == (2 if count > 1 else 0)
        assert len(set(messages)) <= 1


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damage(suffix: str, tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [{"text": "".join(rng.choices("abcdefgh", k=500))} for _ in range(3000)]
    whole = write(tmp_path / f"a.jsonl{suffix}", rows).read_bytes()
    path = tmp_path / f"b.jsonl{suffix}"
    path.write_bytes(whole[: len(whole) // 2])
    problems = Problems("skip")
    texts = [len(b) for b in read_texts(find_sources(path)[0], problems, batch_bytes=1 << 16)]
    assert problems.counts == {"unreadable file": 1}
    assert 500 < sum(texts) < 2000
    with pytest.raises(DataError, match="unreadable file"):
        list(read_texts(find_sources(path)[0], Problems("fail")))


def test_folders_and_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "c.parquet"):
        write(tmp_path / name, ROWS["text"])
    (tmp_path / "notes.txt").touch()
    assert [s.path.name for s in find_sources(tmp_path)] == ["a.jsonl.gz", "b.jsonl", "c.parquet"]
    with pytest.raises(DataError, match="expected a name ending in"):
        find_sources(tmp_path / "notes.txt")
