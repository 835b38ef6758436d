"""Which samples become rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fastsft.synthesis.draw import Drawn, Sample
from fastsft.synthesis.select import SelectOptions, select
from fastsft.verify.tasks import Task

ALL = SelectOptions(per_task=0, near=0, near_all=0)
LONG = "def total(values):\n    result = 0\n    for value in values:\n        result += value\n    return result\n"


def sample(text: str, failure: str | None = None, *, finished: bool = True) -> Sample:
    return Sample(text, len(text), finished, -1.5, failure)


def selected(samples: list[Sample], options: SelectOptions) -> tuple[list[str], dict[str, int]]:
    """Completions of one task, and what was dropped."""
    rows, report = select([Task("t", "ask", "")], [Drawn("t", tuple(samples))], options, completion=True)
    return [r["completion"] for r in rows], report["dropped"]


def test_rows() -> None:
    tasks = [Task("a", "ask a"), Task("b", "ask b")]
    drawn = [Drawn("a", (sample("no", "NameError"), sample("yes"))), Drawn("b", (sample("yes"), sample("yes!")))]
    meta: dict[str, Any] = {"task_id": "a", "sample": 1, "pass_rate": 0.5, "logprob": -1.5, "tokens": 3}
    rows, _ = select(tasks, drawn, ALL, completion=True)
    assert rows[0] == {"prompt": "ask a", "completion": "yes", "meta": meta}
    rows, _ = select(tasks, drawn, ALL, completion=False)
    assert rows[0] == {
        "messages": [{"role": "user", "content": "ask a"}, {"role": "assistant", "content": "yes"}],
        "meta": meta,
    }
    assert [(r["meta"]["task_id"], r["meta"]["sample"]) for r in rows] == [("a", 1), ("b", 0), ("b", 1)]


def test_what_failed_or_was_cut_off_is_no_row() -> None:
    samples = [sample("a"), sample("b", "timeout"), sample("c", finished=False), sample("d", "X", finished=False)]
    assert selected(samples, ALL) == (["a"], {"failed": 2, "cut off at max_tokens": 1})


def test_the_shortest_stay_in_the_order_drawn() -> None:
    samples = [sample("22"), sample("1"), sample("333"), sample("4444"), sample("55")]
    assert selected(samples, replace(ALL, per_task=3)) == (["22", "1", "55"], {"above per_task": 2})


def test_a_random_choice_is_a_function_of_the_seed() -> None:
    samples = [sample(f"{i}") for i in range(10)]
    options = replace(ALL, per_task=3, choose="random")
    found = {seed: tuple(selected(samples, replace(options, seed=seed))[0]) for seed in range(30)}
    assert found[0] == tuple(selected(samples, options)[0])
    assert len(set(found.values())) > 10
    assert {text for chosen in found.values() for text in chosen} == {f"{i}" for i in range(10)}


def test_nearly_equal_answers_of_a_task() -> None:
    """Of each cluster the preferred one stays; fences and what is around them do not count."""
    near = LONG.replace("result +=", "result  +=")
    other = "total = sum\n"
    kept, dropped = selected([sample(near), sample(LONG), sample(other), sample(LONG)], replace(ALL, near=0.8))
    assert kept == [LONG, other]
    assert dropped == {"nearly equal to another of its task": 2}
    fenced = [sample(f"Here you are:\n```python\n{LONG}```"), sample(f"```\n{LONG}```\nIt adds up all of the values.")]
    rows, report = select([Task("t", "ask")], [Drawn("t", tuple(fenced))], replace(ALL, near=1.0), completion=False)
    assert [r["meta"]["sample"] for r in rows] == [0]
    assert report["dropped"] == {"nearly equal to another of its task": 1}


def test_nearly_equal_rows_of_different_tasks() -> None:
    """Prompt and answer count together: one answer to two questions stays."""
    tasks = [Task("a", "Add all values in the list, please."), Task("b", "Add all values in the list, please!"),
             Task("c", "Write a function that is given numbers and gives their sum back.")]  # fmt: skip
    drawn = [Drawn(t.task_id, (sample(LONG),)) for t in tasks]
    rows, report = select(tasks, drawn, replace(ALL, near_all=0.85), completion=False)
    assert [r["meta"]["task_id"] for r in rows] == ["a", "c"]
    assert report["dropped"] == {"nearly equal to a row before it": 1}
    assert len(select(tasks, drawn, ALL, completion=False)[0]) == 3


def test_report() -> None:
    tasks = [Task(str(i), "p") for i in range(9)]
    drawn = [
        Drawn(str(i), tuple(sample(f"{i}{j}", None if j < i else "E" if j % 2 else "timeout") for j in range(7)))
        for i in range(8)
    ]
    rows, report = select(tasks, [*drawn, Drawn("8", (), "too long")], ALL, completion=True)
    assert report == {
        "tasks": 9, "tasks_solved": 7, "samples": 56, "passed": 28, "pass_at_1": 0.5,
        "pass_rates": {"0": 1, "up to 1/4": 1, "up to 1/2": 2, "up to 3/4": 2, "below 1": 1, "1": 1},
        "rows": 28, "dropped": {"failed": 28}, "failures": {"timeout": 16, "E": 12},
        "tasks_left_out": 1, "tasks_left_out_examples": ["8: too long"],
    }  # fmt: skip
    assert len(rows) == 28


def test_refusals() -> None:
    for options, message in (
        (SelectOptions(per_task=-1), "per_task: expected at least 0, got -1"),
        (SelectOptions(near=-0.1), r"near: expected a similarity in \[0, 1\], got -0\.1"),
        (SelectOptions(near_all=1.5), "near_all: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            select([], [], options, completion=True)
