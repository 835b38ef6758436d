"""fastsft bench compare: verdicts, machines, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_cases import MACHINE, result, row

from fastsft import cli
from fastsft.bench.compare import changes, differences, verdict


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (1.5, "slower"),
        (1.11, "slower"),
        (1.09, "equal"),
        (1.0, "equal"),
        (0.92, "equal"),
        (0.89, "faster"),
        (0.5, "faster"),
    ],
)
def test_verdict(after: float, expected: str) -> None:
    assert verdict(row("g"), row("g", median=after), 0.1) == expected


def test_what_overlaps_is_equal() -> None:
    wide = {"p20": 0.7, "p80": 1.6}
    assert verdict(row("g", **wide), row("g", median=1.5), 0.1) == "equal"
    assert verdict(row("g"), row("g", median=1.5, **wide), 0.1) == "equal"
    assert verdict(row("g", median=1.5), row("g", median=1.0, **wide), 0.1) == "equal"
    old = {"p20": None, "p80": None, "iqr": 1.2}
    assert verdict(row("g", **old), row("g", median=1.5), 0.1) == "equal"


def test_changes_are_of_ours_with_the_drift_of_the_rivals() -> None:
    before = result(row("g"), row("g", "x"), row("g", "y"), row("old"))
    after = result(row("g", median=1.3), row("g", "x", 1.2), row("g", "y", 1.4), row("g", "new"), row("new"))
    (change,) = changes(before, after, 0.1)
    assert (change.contestant, change.times, change.verdict) == ("fastsft", 1.3, "slower")
    assert change.rivals == pytest.approx(1.3)
    with pytest.raises(ValueError, match="no group in common"):
        changes(result(row("a")), result(row("b")), 0.1)
    for threshold in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="--threshold: expected a share"):
            changes(before, after, threshold)


def test_differences() -> None:
    other = {**MACHINE, "cpu": "Other", "versions": {"torch": "2.6", "fastsft": "0.2"}}
    assert differences(result(), result(machine=other)) == [
        "cpu: Toy before, Other after", "versions.torch: 2.13.0 before, 2.6 after",
    ]  # fmt: skip
    assert differences(result(), result()) == []


def run(tmp_path: Path, after: float, *flags: str, cpu: str = "Toy") -> int:
    result(row("g [1, 2]")).write(tmp_path / "a.json")
    result(row("g [1, 2]", median=after), machine={**MACHINE, "cpu": cpu}).write(tmp_path / "b.json")
    try:
        cli.main(["bench", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), *flags])
    except SystemExit as end:
        return int(str(end.code))
    return 0


def test_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, 1.5) == 1
    out = capsys.readouterr().out
    assert "slower" in out
    assert "g [1, 2]" in out
    assert "0 faster, 1 slower, 0 equal; 0 groups in one of the two only" in out
    assert "NOT THE SAME" not in out
    assert run(tmp_path, 1.5, "--threshold", "0.6") == 0
    assert run(tmp_path, 0.5, cpu="Other") == 0
    assert "NOT THE SAME MACHINE OR VERSIONS: cpu: Toy before, Other after" in capsys.readouterr().out
    assert run(tmp_path, 1.5, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["changes"][0]["verdict"], found["changes"][0]["times"]) == ("slower", 1.5)
    assert run(tmp_path, 1.5, "--threshold", "-1") == 2
