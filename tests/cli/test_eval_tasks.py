"""fastsft eval --tasks: samples drawn or given, executed, reported, and gone on with after a kill."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cli_cases import refusal, result_of, write

from fastsft.report.evaluation import evaluation_page

INC = {
    "task_id": "HumanEval/0",
    "prompt": "def inc(x):\n",
    "entry_point": "inc",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n",
}
SUM = {
    "task_id": "sum",
    "prompt": "p",
    "cases": [{"input": "1 2\n", "output": "3\n"}, {"input": "0.5 0.25", "output": "0.75"}],
    "compare": "floats",
}


def samples_of(task_id: str, *texts: str, key: str = "completion") -> list[dict[str, Any]]:
    return [{"task_id": task_id, key: text} for text in texts]


def test_samples_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = write(tmp_path / "tasks.jsonl", [INC, SUM])
    good = "print(sum(map(float, input().split())))"
    rows = samples_of("HumanEval/0", "    return x + 1\n", "    return x\n", "    return x +\n", "    return y\n")
    rows += samples_of("sum", good, "print(3)") + samples_of("sum", "while True: pass", good, key="solution")
    rows[:1] = samples_of("HumanEval/0", "def inc(x): return x + 1", key="solution")
    options = ["--tasks", tasks, "--samples", write(tmp_path / "s.jsonl", rows), "--k", "1", "2", "--seconds", "0.5"]
    output = tmp_path / "out"
    report = result_of(capsys, "eval", *options, "--output", output)["tasks"]
    assert report["pass_at"] == {"1": (0.25 + 0.5) / 2, "2": pytest.approx((1 / 2 + 5 / 6) / 2)}
    assert (report["samples"], report["passed"]) == (8, 3)
    kinds = {"AssertionError": 1, "SyntaxError": 1, "NameError": 1, "WrongOutput": 1, "timeout": 1}
    assert report["failures"] == kinds
    first, second = report["tasks"]
    assert first["failure"] == "AssertionError: AssertionError"
    assert second["failure"].startswith("WrongOutput: WrongOutput: case 2: expected '0.75'")
    assert report["settings"]["k"] == [1, 2]
    assert "limits" in report["settings"]["layers"]
    assert json.loads((output / "report.json").read_text()) == report
    page = (output / "report.html").read_text()
    assert all(f"<td>{kind}</td>" in page for kind in kinds)
    results = (output / "results.jsonl").read_bytes()
    assert result_of(capsys, "eval", *options, "--output", output)["tasks"] == report
    assert (output / "results.jsonl").read_bytes() == results, "nothing was executed again"
    assert "with other settings: seconds" in refusal(capsys, "eval", *options[:-1], "2", "--output", output)


def test_what_a_model_drew_scores_the_same_elsewhere(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = {"task_id": "h", "prompt": "say", "prefix": "x = 1 #", "check": "assert x == 1"}
    tasks = write(tmp_path / "tasks.jsonl", [half, half | {"task_id": "w", "check": "assert x == 2"}, INC])
    model, output = trained / "run" / "model", tmp_path / "out"
    options = ["--tasks", tasks, "--n", "3", "--k", "1", "3", "--temperature", "1", "--top-p", "0.9", "--stop", "\n"]
    options += ["--max-tokens", "4", "--completion", "--output", output]
    report = result_of(capsys, "eval", model, *options)["tasks"]
    assert [t["passed"] for t in report["tasks"]] == [3, 0, 0]
    settings = report["settings"]
    assert (settings["n"], settings["temperature"], settings["top_p"], settings["stop"]) == (3, 1.0, 0.9, ["\n"])
    assert settings["engine"].startswith("fastsft ")
    assert len(settings["weights_hash"]) == 32
    lines = [json.loads(line) for line in (output / "completions.jsonl").read_text().splitlines()]
    assert [line["task_id"] for line in lines] == ["h"] * 3 + ["w"] * 3 + ["HumanEval/0"] * 3
    assert all(line.keys() == {"task_id", "completion"} for line in lines)
    again = result_of(capsys, "eval", "--tasks", tasks, "--samples", output / "completions.jsonl", "--k", "1", "3")
    same = ("pass_at", "passed", "failures", "tasks")
    assert [again["tasks"][key] for key in same] == [report[key] for key in same]
    assert "with other settings: seed" in refusal(capsys, "eval", model, *options, "--seed", "1")


def test_killed_and_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = write(tmp_path / "tasks.jsonl", [{"task_id": "t", "prompt": "", "check": "assert x % 3"}])
    rows = samples_of("t", *(f"import time\ntime.sleep(0.02)\nx = {i}" for i in range(150)))
    options = ["--tasks", str(tasks), "--samples", str(write(tmp_path / "s.jsonl", rows)), "--output"]
    output = tmp_path / "out"
    results = output / "results.jsonl"
    command = [sys.executable, "-m", "fastsft", "eval", *options, str(output), "--workers", "2"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 100
        while not (results.exists() and results.stat().st_size) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
    done = results.read_bytes()
    assert 0 < done.count(b"\n") < 150, "it was killed on the way"
    with open(results, "ab") as stream:
        stream.write(b'{"task_id": "t", "fail')  # half a line, as a kill within a write leaves
    report = result_of(capsys, "eval", *options, output)["tasks"]
    assert results.read_bytes().startswith(done)
    assert [json.loads(line)["failure"] is None for line in results.open()] == [i % 3 != 0 for i in range(150)]
    assert (report["samples"], report["passed"], report["failures"]) == (150, 100, {"AssertionError": 50})


def test_other_languages(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.toml").write_text('[shell]\nfile = "a.sh"\nrun = ["bash", "a.sh"]\n')
    task = {"task_id": "t", "prompt": "", "cases": [{"input": "4", "output": "4"}], "language": "shell"}
    tasks = write(tmp_path / "tasks.jsonl", [task])
    samples = write(tmp_path / "s.jsonl", samples_of("t", "cat", "echo 5", "exit 3"))
    given = ["eval", "--tasks", tasks, "--samples", samples]
    report = result_of(capsys, *given, "--languages", tmp_path / "own.toml")["tasks"]
    assert report["failures"] == {"WrongOutput": 1, "error": 1}
    assert "language: expected one of bash, c," in refusal(capsys, *given)


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = write(tmp_path / "tasks.jsonl", [INC, SUM])
    good = samples_of("HumanEval/0", "a", "b") + samples_of("sum", "c", "d")
    for rows, options, message in (
        (good[:3], ["--k", "2"], "expected at least 2 samples of each task for --k 2, got 1 of sum"),
        (good[:2], [], "expected at least 1 samples of each task for --k 1, got 0 of sum"),
        (samples_of("other", "a"), [], "s.jsonl:1: task_id: expected one of the tasks, got 'other'"),
        ([{"task_id": "sum"}], [], "s.jsonl:1: expected task_id and completion or solution"),
        ([{"task_id": ["sum"], "completion": ""}], [], "s.jsonl:1: task_id: expected one of the tasks, got ['sum']"),
        ([1], [], "s.jsonl:1: expected an object, got int"),
        (good, ["--k", "0"], "--k: expected numbers from 1, got 0"),
    ):
        samples = write(tmp_path / "s.jsonl", rows)
        assert message in refusal(capsys, "eval", "--tasks", tasks, "--samples", samples, *options)
    samples = write(tmp_path / "s.jsonl", good)
    assert "--samples: expected --tasks" in refusal(capsys, "eval", "--samples", samples, "--data", samples)
    assert "expected a model" in refusal(capsys, "eval", "--tasks", tasks)
    assert "expected no model" in refusal(capsys, "eval", "m", "--tasks", tasks, "--samples", samples)


def test_page_is_escaped() -> None:
    task = {"task_id": "<b>", "samples": 2, "passed": 1, "failures": {"<i>": 1}, "failure": "<i>: <script>"}
    page = evaluation_page({"pass_at": {"1": 0.5}, "samples": 2, "passed": 1, "failures": {"<i>": 1},
                            "tasks": [task], "settings": {"stop": ["<s>", "x"], "n": 2}})  # fmt: skip
    assert "&lt;script&gt;" in page
    assert not any(tag in page for tag in ("<b>", "<i>", "<script>", "<s>"))
    assert "&lt;s&gt;, x" in page
    assert "0.500" in page
