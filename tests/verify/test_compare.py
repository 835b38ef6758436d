from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastsft.verify.compare import agrees, checked
from fastsft.verify.judge import judge
from fastsft.verify.sandbox import Limits
from fastsft.verify.tasks import Task, read_tasks


@pytest.mark.parametrize(
    ("written", "expected", "under"),
    [
        ("a b\n", "a b\n", "exact lines tokens floats"),
        ("a b", "a b\n", "lines tokens floats"),
        ("a b  \n\n \n", "a b\n", "lines tokens floats"),
        (" a b\n", "a b\n", "tokens floats"),
        ("a\nb\n", "a b\n", "tokens floats"),
        ("1.0000001 x\n", "1 x\n", "floats"),
        ("1e-9", "0", "floats"),
        ("1.1", "1", ""),
        ("1 1", "1", ""),
        ("x", "y", ""),
        ("1", "one", ""),
        ("nan", "nan", "exact lines tokens floats"),
        ("nan", "1", ""),
        ("inf", "1e308", ""),
        ("", "", "exact lines tokens floats"),
        ("", "x", ""),
    ],
)
def test_comparators(written: str, expected: str, under: str) -> None:
    for name in ("exact", "lines", "tokens", "floats"):
        assert agrees(written, expected, name, 1e-6) == (name in under.split()), name


def test_tolerance() -> None:
    assert agrees("101", "100", "floats", 0.02)
    assert not agrees("103", "100", "floats", 0.02)


FACTORS = """
factors = list(map(int, written.split()))
assert len(factors) == 2 and 1 not in factors, "two factors"
assert factors[0] * factors[1] == int(given), f"product {factors[0] * factors[1]}"
"""


def test_a_checker_decides() -> None:
    task = Task("t", "", cases=(("15\n", ""), ("21\n", "")), checker=FACTORS)
    right = "n = int(input())\nf = next(i for i in range(2, n) if n % i == 0)\nprint(n // f, f)"
    wrong = "print(3, 5)"
    careless = "print('15); import os; os._exit(0)')"
    results = judge([(task, right), (task, wrong), (task, careless)])
    assert [r.status for r in results] == ["ok", "wrong", "wrong"]
    assert results[1].stderr == "WrongOutput: case 2: AssertionError: product 15\n"
    assert "ValueError: invalid literal" in results[2].stderr
    endless = Task("t", "", cases=(("", ""),), checker="while True: pass")
    (result,) = judge([(endless, "")], limits=Limits(seconds=0.3))
    assert (result.status, "the checker ended in timeout" in result.stderr) == ("wrong", True)


def test_a_checker_that_is_none_is_told_apart() -> None:
    with pytest.raises(ValueError, match=r"checker: SyntaxError"):
        checked("def", "", "", "", None)
    with pytest.raises(ValueError, match=r"task t: checker: SyntaxError"):
        judge([(Task("t", "", cases=(("", ""),), checker="def"), "")])


def test_in_files(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    row = {"task_id": "a", "prompt": "p", "cases": [{"input": "1", "output": "2"}]}
    path.write_text(json.dumps(row | {"compare": "floats", "tolerance": 0.1, "language": "c"}))
    assert read_tasks(path) == [Task("a", "p", "", "", (("1", "2"),), "c", "floats", 0.1)]
    path.write_text(json.dumps(row | {"cases": [{"input": "1"}], "checker": "pass"}))
    assert read_tasks(path) == [Task("a", "p", cases=(("1", ""),), checker="pass")]
    for change, message in (
        ({"compare": "fuzzy"}, "compare: expected one of exact, lines, tokens, floats, got 'fuzzy'"),
        ({"tolerance": -1}, "tolerance: expected a number from 0, got -1"),
        ({"language": 1}, "language: expected text, got 1"),
    ):
        path.write_text(json.dumps(row | change))
        with pytest.raises(ValueError, match=rf"tasks.jsonl:1: .*{message}"):
            read_tasks(path)
    path.write_text(json.dumps({"task_id": "a", "prompt": "p", "check": "", "language": "c"}))
    with pytest.raises(ValueError, match="expected cases with a task in c"):
        read_tasks(path)
