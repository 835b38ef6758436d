"""Files that hold one JSON list of rows: the same rows as the json module reads, wherever the stream is cut."""

from __future__ import annotations

import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest

from fastsft.data import json_list
from fastsft.data.dedup_files import dedup_files
from fastsft.data.json_list import ListLines
from fastsft.data.link import LinkOptions
from fastsft.data.problems import DataError, Problems
from fastsft.data.records import read_records
from fastsft.data.scan import SketchOptions
from fastsft.data.sources import find_sources
from fastsft.data.texts import read_texts

ROWS: list[dict[str, Any]] = [
    {"text": 'brackets ]}, {[ and "quotes" \\ \\\\" é\n\t\u2028'},
    {"text": "", "more": {"deep": [[], {}, [1, {"a": ["]", "\\"]}]]}},
    {"instruction": "Add.", "input": "1, 2", "output": "3"},
    {"text": "\\" * 2500 + '"'},
    *({"text": f"row {i}", "id": i} for i in range(40)),
]


def lines_of(data: bytes) -> list[bytes]:
    return ListLines(io.BytesIO(data)).read().split(b"\n")


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64, 1 << 17])
@pytest.mark.parametrize("indent", [None, 2])
def test_lines_are_the_items(piece: int, indent: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_list, "_PIECE", piece)
    data = json.dumps(ROWS, indent=indent, ensure_ascii=False).encode()
    assert [json.loads(line) for line in lines_of(b" \r\n" + data + b"\n \n")] == ROWS
    assert lines_of(b"[]") == [b""]


def test_random_values(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)

    def value(depth: int) -> Any:
        kind = rng.randrange(5 if depth else 3)
        if kind < 2:
            return "".join(rng.choices('ab"\\[]{},\n\u00e9', k=rng.randrange(8)))
        if kind == 2:
            return rng.choice([None, True, -1.5e3])
        items = [value(depth - 1) for _ in range(rng.randrange(4))]
        return items if kind == 3 else {str(i) + '"]': item for i, item in enumerate(items)}

    for _ in range(300):
        monkeypatch.setattr(json_list, "_PIECE", rng.choice([1, 5, 30]))
        items = [value(3) for _ in range(rng.randrange(1, 5))]
        data = json.dumps(items, indent=rng.choice([None, 1]), ensure_ascii=rng.random() < 0.5).encode()
        assert [json.loads(line) for line in lines_of(data)] == items


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_files(name: str, tmp_path: Path) -> None:
    data = json.dumps(ROWS, indent=1).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    records = list(read_records([path], Problems("fail")))
    assert [r.source for r in records] == [f"{path}:{i}" for i in range(1, len(ROWS) + 1)]
    assert records[0].parts == (ROWS[0]["text"],)
    (source,) = find_sources(path)
    batches = list(read_texts(source, Problems("fail"), batch_bytes=200))
    assert len(batches) > 3
    again = list(read_texts(source, Problems("fail"), batch_bytes=200, start=batches[1].done))
    assert [n for b in again for n in b.numbers] == [n for b in batches[2:] for n in b.numbers]


def test_lines_of_the_same_name(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"text": "[1"}\n{"text": "b"}\n')
    assert [r.parts for r in read_records([path], Problems("fail"))] == [("[1",), ("b",)]


def test_folders_have_lists_only(tmp_path: Path) -> None:
    """Data sets come with settings in .json files beside them."""
    (tmp_path / "dataset_infos.json").write_text('{"text": "no row"}')
    (tmp_path / "rows.json").write_text('[{"text": "a"}]')
    assert [r.parts for r in read_records([tmp_path], Problems("fail"))] == [("a",)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"text": "a"}, {"text": 1}]', r"a\.json:2: wrong type: text: expected a string, got int"),
        ('[{"text": "a"},\n {"text" "b"}, {"text": "c"}]', r"a\.json:2: broken JSON"),
        ('[{"text": "a\nb"}]', r"a\.json:1: broken JSON"),
        ('[{"text": "a"}, {"text": "\\udc00"}]', r"a\.json:2: broken JSON"),
        ('[{"text": "a"}, 7]', r"a\.json:2: not an object"),
        ('[{"text": "a"}, {"text": "b"}', r"a\.json: unreadable file: the list does not end"),
        ('[{"text": "a"}]\n[{"text": "b"}]', r"a\.json: unreadable file: expected nothing but white space behind"),
    ],
)
def test_bad_files(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(DataError, match=said):
        list(read_records([path], Problems("fail")))
    with pytest.raises(DataError, match=said):
        list(read_texts(find_sources(path)[0], Problems("fail")))
    kept = list(read_records([path], Problems("skip")))
    assert kept == [] or kept[0].parts == ("a",)


@pytest.mark.parametrize("ending", [".json", ".json.gz", ".jsonl"])
def test_deduplicated(ending: str, tmp_path: Path) -> None:
    rows = [{"text": "one row", "n": [1, {"a": 2}]}, {"text": "one row"}, {"text": "another\n]"}]
    path, target = tmp_path / "a.json", tmp_path / f"out{ending}"
    path.write_text(json.dumps(rows, indent=2))
    dedup_files([path], target, Problems("fail"), sketch=SketchOptions("exact"), how=LinkOptions())
    data = gzip.decompress(target.read_bytes()) if ending.endswith(".gz") else target.read_bytes()
    kept = [rows[0], rows[2]]
    if ending == ".jsonl":
        assert [json.loads(line) for line in data.splitlines()] == kept
        assert b"\r" not in data
    else:
        assert json.loads(data) == kept
        assert b'{\n    "text": "one row"' in data


def test_nothing_kept_is_an_empty_list(tmp_path: Path) -> None:
    path, target = tmp_path / "a.json", tmp_path / "out.json"
    path.write_text('[{"text": 1}]')
    dedup_files([path], target, Problems("skip"), sketch=SketchOptions("exact"), how=LinkOptions())
    assert json.loads(target.read_bytes()) == []
