"""bench/record.py: what ran takes its place among what was recorded before, and the texts follow."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from bench_cases import result, row

from fastsft.bench.results import Result
from fastsft.bench.run import Measured

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The script's names; results stand below ``tmp_path``, and nothing is run."""
    names = runpy.run_path(str(ROOT / "bench" / "record.py"))
    scope = names["record"].__globals__
    stats = {"median": 2.0, "iqr": 0.1, "rounds": 3, "data": [1.9, 2.0, 2.1]}
    params = {"contestant": "fastsft"}
    bench = {"group": "new", "name": "x", "fullname": "bench_pack.py::x", "params": params, "extra_info": {}}
    measured = Measured([{**bench, "stats": stats}], {"1": {"copy": 2e10}})
    scope |= {"RESULTS": tmp_path, "run": lambda *arguments: measured, "commit": lambda root: "abc1234"}
    return scope


def test_record(script: dict[str, Any], tmp_path: Path) -> None:
    old = result(row("old"), row("new", "rival"), limits={"2": {"copy": 1e10}})
    old.write(tmp_path / "toy" / "2026-01-02.json")
    path = script["record"]("toy", ["pack"], None)
    found = Result.read(path)
    assert path.parent == tmp_path / "toy"
    assert [(r.group, r.contestant, r.commit) for r in found.rows] == [
        ("old", "fastsft", ""),
        ("new", "fastsft", "abc1234"),
    ]
    assert found.rows[1].date == found.date == path.stem
    assert found.limits == {"1": {"copy": 2e10}, "2": {"copy": 1e10}}
    assert [r.group for r in Result.read(script["record"]("toy", [], None)).rows] == ["new"]  # everything ran


def test_newest_is_no_gpu(script: dict[str, Any], tmp_path: Path) -> None:
    assert script["newest"]() is None
    result(row("a")).write(tmp_path / "z" / "2026-01-01.json")
    result(row("a")).write(tmp_path / "a" / "2026-01-02.json")
    result(row("a"), machine={"gpu": {}}).write(tmp_path / "h100" / "2026-01-03.json")
    assert script["newest"]() == tmp_path / "a" / "2026-01-02.json"
    assert script["newest"]("z") == tmp_path / "z" / "2026-01-01.json"
