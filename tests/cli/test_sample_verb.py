"""sample with a model that writes noise: tasks that any comment solves, and one that nothing does."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
from cli_cases import refusal, result_of, run_file, write

from fastsft import cli

TASKS: list[dict[str, Any]] = [
    {"task_id": "comment", "prompt": "say", "prefix": "#", "check": "assert True"},
    {"task_id": "cases", "prompt": "number", "prefix": "print(2) #", "cases": [{"input": "", "output": "2"}]},
    {"task_id": "hopeless", "prompt": "say", "prefix": "#", "check": "assert False"},
    {"task_id": "long", "prompt": "number " * 300, "check": ""},
    {"task_id": "broken", "prompt": "\ud800", "check": ""},
]
DRAW = ["--completion", "--n", "6", "--temperature", "1", "--max-tokens", "32", "--stop", "\n", *string.ascii_lowercase]


def test_sample(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks, output = write(tmp_path / "tasks.jsonl", TASKS), tmp_path / "data.jsonl"
    command = ["sample", trained / "run" / "model", tasks, "-o", output, "--near", "0", "--near-all", "0", *DRAW]
    report = result_of(capsys, *command)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert report["rows"] == len(rows) > 0
    assert report["tasks"] == 5
    assert report["samples"] == 18
    assert report["failures"].get("AssertionError", 0) > 0
    assert [e.partition(": ")[0] for e in report["tasks_left_out_examples"]] == ["long", "broken"]
    assert {r["meta"]["task_id"] for r in rows} <= {"comment", "cases"}
    assert all(r["prompt"] and "\n" not in r["completion"] for r in rows)

    written = output.read_bytes()
    cli.main([*map(str, command)])
    out = capsys.readouterr().out
    assert output.read_bytes() == written
    assert f"{len(rows)} rows: {output}" in out
    assert "2 tasks left out, e.g. long: " in out
    assert result_of(capsys, *command, "--per-task", "1")["rows"] <= 2  # another selection from the same draws

    assert "drawn with other settings: seed. Restore" in refusal(capsys, *command, "--seed", "1")
    run = run_file(tmp_path, output)  # the rows are training data
    cli.main(["train", str(run), "--data.eval-fraction", "0"])


def test_answers_become_messages(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = write(tmp_path / "tasks.jsonl", TASKS[:1])
    model, output = trained / "run" / "model", tmp_path / "data.jsonl"
    result_of(capsys, "sample", model, tasks, "-o", output, *DRAW[1:])
    for line in output.read_text().splitlines():
        row = json.loads(line)
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
        assert row["messages"][0]["content"] == "say"


def test_sample_refusals(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = trained / "run" / "model", ["-o", tmp_path / "out.jsonl"]
    empty, tasks = write(tmp_path / "empty.jsonl", []), write(tmp_path / "tasks.jsonl", TASKS)
    assert refusal(capsys, "sample", model, empty, *out) == f"sample: {empty}: no task"
    assert "near: expected a similarity" in refusal(capsys, "sample", model, tasks, *out, "--near", "2")
    assert "temperature: expected" in refusal(capsys, "sample", model, tasks, *out, "--temperature", "-1")
    assert "expected the name of a file" in refusal(capsys, "sample", model, tasks, "-o", tmp_path)
    write(tasks, [TASKS[0], TASKS[0]])
    assert "got 'comment' twice" in refusal(capsys, "sample", model, tasks, *out)
