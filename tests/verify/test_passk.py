from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import pytest

from fastsft.verify.passk import evaluate_tasks, pass_at_k
from fastsft.verify.tasks import Task, extract_code, read_tasks


@pytest.mark.parametrize(("n", "c", "k"), [(1, 0, 1), (1, 1, 1), (5, 2, 1), (5, 2, 3), (6, 5, 2), (7, 3, 5), (6, 0, 6)])
def test_against_enumeration(n: int, c: int, k: int) -> None:
    draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(d) for d in draws) / len(draws))


def test_impossible_numbers() -> None:
    for n, c, k in ((1, 2, 1), (3, 1, 4), (3, -1, 1), (3, 1, 0)):
        with pytest.raises(ValueError, match="pass_at_k: expected"):
            pass_at_k(n, c, k)


def test_tasks_are_executed() -> None:
    tasks = [Task("double", "", "assert f(3) == 6"), Task("head", "", "assert g(1) == 2", prefix="def g(x):\n")]
    samples = [["def f(x):\n    return x * 2", "def f(x):\n    return x", "def f("], ["    return x + 1"] * 3]
    report = evaluate_tasks(tasks, samples, k=(1, 2))
    assert [t.passed for t in report.tasks] == [1, 3]
    assert report.pass_at[1] == pytest.approx((1 / 3 + 1) / 2)
    assert report.pass_at[2] == pytest.approx((2 / 3 + 1) / 2)
    assert report.statuses == {"ok": 4, "wrong": 1, "compile_error": 1}
    with pytest.raises(ValueError, match=r"samples: expected at least 2 for each of 2 tasks, got \[1, 1\]"):
        evaluate_tasks(tasks, [["a"], ["b"]], k=(2,))


def test_leaving_before_the_check_is_no_pass() -> None:
    task = Task("early", "", "assert f() == 1\nprint('checked')")
    good, quits, leaves = "def f(): return 1", "import sys\nsys.exit(0)", "import os\nos._exit(0)"
    report = evaluate_tasks([task], [[good, quits, leaves, "def f():\n    raise SystemExit"]])
    assert [r.status for r in report.tasks[0].results] == ["ok", "error", "error", "error"]
    assert report.tasks[0].passed == 1
    assert report.tasks[0].results[0].stdout == "checked\n"
    assert "before its check" in report.tasks[0].results[1].stderr


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl.gz"
    human_eval = {
        "task_id": "HumanEval/0",
        "prompt": "def inc(x):\n",
        "entry_point": "inc",
        "canonical_solution": "    return x + 1\n",
        "test": "def check(candidate):\n    assert candidate(1) == 2\n",
    }
    own = {"task_id": "own", "prompt": "p", "check": "assert True"}
    with gzip.open(path, "wt") as stream:
        stream.write(json.dumps(human_eval) + "\n\n" + json.dumps(own) + "\n")
    tasks = read_tasks(path)
    assert [t.task_id for t in tasks] == ["HumanEval/0", "own"]
    assert evaluate_tasks(tasks, [["    return x + 1\n"], [""]]).pass_at[1] == 1.0
    broken = tmp_path / "broken.jsonl"
    program = {"task_id": "c", "prompt": "p"}
    for row, message in (
        ({}, "expected task_id, prompt and check, cases "),
        ([own], "expected an object, got list"),
        (own | {"task_id": None}, "task_id: expected text or a number, got None"),
        (own | {"prompt": 1}, "prompt: expected text, got 1"),
        (own | {"check": ["pass"]}, r"check: expected text, got \['pass'\]"),
        (own | {"prefix": None}, "prefix: expected text, got None"),
        (human_eval | {"test": None}, "test: expected text, got None"),
        (program | {"cases": []}, "cases: expected at least one object with input and output"),
        (program | {"cases": ["1"]}, "cases: expected at least one object with input and output"),
        (program | {"cases": [{"input": "1", "output": 2}]}, "output: expected text, got 2"),
        (program | {"cases": [{"input": "1"}]}, "found no 'output'"),
    ):
        broken.write_text(json.dumps(own) + "\n" + json.dumps(row) + "\n")
        with pytest.raises(ValueError, match=rf"broken.jsonl:2: .*{message}"):
            read_tasks(broken)
    for line, message in ((b"{", "expected an object"), (b'{"\xff": 1}', "expected an object"),
                          (b"[" * 100_000, "expected an object")):  # fmt: skip
        broken.write_bytes(b"\n" + line)
        with pytest.raises(ValueError, match=f"broken.jsonl:2: {message}"):
            read_tasks(broken)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{path.name}: damaged, or not compressed with gzip"):
        read_tasks(path)
    broken.write_text(json.dumps(program | {"task_id": 11, "check": ""}))  # as in MBPP
    assert read_tasks(broken)[0].task_id == 11
    broken.write_text(json.dumps(program | {"cases": [{"input": "1", "output": "2"}] * 2}))
    assert read_tasks(broken) == [Task("c", "p", cases=(("1", "2"), ("1", "2")))]


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("def f(): pass", "def f(): pass"),
        ("Sure:\n```python\ndef f(): pass\n```\nDone.", "def f(): pass\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```x = 1```", "x = 1"),
        ("```py\nx = 1", "x = 1"),
    ],
)
def test_extract_code(answer: str, code: str) -> None:
    assert extract_code(answer) == code
