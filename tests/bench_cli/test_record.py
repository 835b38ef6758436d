"""bench/record.py: what ran takes its place among what was recorded before, and the texts follow."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from bench_cases import MACHINE, result, row

from fastsft.bench.page import HEADLINES
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
    scope |= {"machine": lambda: dict(MACHINE)}
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


def test_another_processor_needs_another_name(script: dict[str, Any], tmp_path: Path) -> None:
    result(row("old"), machine={**MACHINE, "cpu": "Else"}).write(tmp_path / "toy" / "2026-01-02.json")
    script["run"] = lambda *arguments: pytest.fail("told before anything is measured")
    with pytest.raises(SystemExit, match=r"measured on Else \(avx2\), and this is Toy \(avx2\): it needs a NAME"):
        script["record"]("toy", ["pack"], None)


def test_newest_is_no_gpu(script: dict[str, Any], tmp_path: Path) -> None:
    assert script["newest"]("z") is None
    result(row("a")).write(tmp_path / "z" / "2026-01-01.json")
    result(row("a")).write(tmp_path / "z" / "2026-01-02.json")
    result(row("a"), machine={"gpu": {}}).write(tmp_path / "z" / "2026-01-03.json")
    assert script["newest"]("z") == tmp_path / "z" / "2026-01-02.json"


def test_a_page_for_each_machine(script: dict[str, Any], tmp_path: Path) -> None:
    """The machine with the most rows has the main page and the README's table."""
    rows = [row(group, name, 2.0, times_ours=2.0) for _, group in HEADLINES for name in ("fastsft", "slow")]
    result(*rows).write(tmp_path / "results" / "big" / "2026-01-01.json")
    result(row("a")).write(tmp_path / "results" / "small" / "2026-01-02.json")
    (tmp_path / "README.md").write_text("<!-- benchmarks -->\n<!-- /benchmarks -->\n")
    script |= {"ROOT": tmp_path, "RESULTS": tmp_path / "results", "page": lambda r, source, *_: source}
    texts = {str(path.relative_to(tmp_path)): text for path, text in script["texts"]().items()}
    assert texts["docs/benchmarks.md"] == "results/big/2026-01-01.json"
    assert texts["docs/benchmarks-small.md"] == "results/small/2026-01-02.json"
    assert HEADLINES[0][0] in texts["README.md"]
