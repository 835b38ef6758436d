"""Rows from pytest-benchmark's data, ratios, what is kept of older results, old files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench_cases import result, row

from fastsft.bench.results import Result, merged, seconds, set_ratios, summarise

ROOT = Path(__file__).parents[2]


def measured(name: str, times: list[float], params: dict[str, Any] | None = None, **extra: Any) -> dict[str, Any]:
    median = sorted(times)[len(times) // 2]
    return {
        "group": "g", "name": name, "fullname": f"bench_pack.py::{name}", "params": params, "extra_info": extra,
        "stats": {"median": median, "iqr": 0.5, "rounds": len(times), "data": times},
    }  # fmt: skip


def test_summarise() -> None:
    times = [float(i) for i in range(1, 12)]
    ours, rival, named = summarise(
        [
            measured("test_pack[x]", times, {"contestant": "fastsft"}, share_of_copy=0.25, fill=0.9),
            measured("test_pack[y]", [3 * t for t in times], {"contestant": "trl"}),
            measured("fastsft, imported", times),
        ]
    )
    assert (ours.bench, ours.p20, ours.median, ours.p80) == ("pack", 3.0, 6.0, 9.0)  # of 1 to 11
    assert (ours.shares, ours.notes) == ({"copy": 0.25}, {"fill": 0.9})
    assert rival.times_ours == 3
    assert (named.contestant, named.is_ours, named.beats_us) == ("fastsft, imported", True, False)
    assert summarise([measured("test_alone", times)])[0].contestant == "fastsft"


def test_ratios_are_of_as_much_work() -> None:
    rows = [
        row("g", median=1.0, extra={"documents_per_second": 1000.0}),
        row("g", "slow", median=0.5, extra={"documents_per_second": 100.0}),
    ]
    set_ratios(rows)
    assert [r.times_ours for r in rows] == [1.0, 10.0]
    assert not rows[1].beats_us


def test_lost_names_the_fastest_rival_of_each_group() -> None:
    found = result(
        row("a", times_ours=1.0), row("a", "x", times_ours=0.9), row("a", "y", times_ours=0.8),
        row("b", times_ours=1.0), row("b", "x", times_ours=0.5), row("c", "fastsft, else", times_ours=0.1),
    )  # fmt: skip
    assert [(r.group, r.contestant) for r in found.lost()] == [("b", "x"), ("a", "y")]
    assert found.contested() == {"a", "b"}


def test_rows_without_p20_are_read(tmp_path: Path) -> None:
    old = {"bench": "pack", "group": "g", "contestant": "fastsft", "median": 4.0, "iqr": 2.0, "rounds": 3, "extra": {}}
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"date": "2026-01-01", "machine": {}, "rows": [old]}))
    (found,) = Result.read(path).rows
    assert found.spread == (3.0, 5.0)


def test_written_and_read(tmp_path: Path) -> None:
    before = result(row("g", extra={"share_of_read": 0.5}), limits={"2": {"read": 1e10}})
    before.write(tmp_path / "folder" / "r.json")
    assert Result.read(tmp_path / "folder" / "r.json") == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"date": "", "machine": {}, "rows": [{"group": "g"}]}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"x\.json: expected results of fastsft bench"):
        Result.read(path)


def test_merged_replaces_whole_groups() -> None:
    older = result(row("a"), row("a", "gone"), row("b"))
    assert [(r.group, r.contestant) for r in merged(older, [row("a", "new")])] == [("b", "fastsft"), ("a", "new")]


def test_seconds() -> None:
    assert [seconds(x) for x in (12.34, 0.0456, 7.8e-5, 9e-9)] == ["12.3 s", "45.6 ms", "78 us", "9 ns"]


def test_every_stored_result_is_read() -> None:
    paths = list((ROOT / "bench" / "results").glob("*/[0-9]*.json"))
    assert paths
    for path in paths:
        if '"gpu"' not in path.read_text():
            assert Result.read(path).by_topic()
