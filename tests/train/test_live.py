"""Samples and tasks during training: logged, drawn from the weights of their step, and without a trace in the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from kill_resume import same_checkpoint, weights
from resume_cases import small, train

import fastsft
from fastsft.config import ConfigError, load_config
from fastsft.train import live
from fastsft.train.metrics import read_metrics
from fastsft.train.trainer import Trainer
from fastsft.verify.sandbox import SandboxResult

TASKS = [
    {"task_id": "passes", "prompt": "def", "prefix": "x = 1 #", "check": "assert x == 1"},
    {"task_id": "fails", "prompt": "def", "prefix": "x = 1 #", "check": "assert x == 2"},
]


def watched(texts: Path, output: Path, **eval_keys: Any) -> dict[str, Any]:
    tasks = output.parent / "tasks.jsonl"
    tasks.write_text("".join(json.dumps(task) + "\n" for task in TASKS))
    config = small(texts, output)
    config["samples"] = {"prompts": ["def value", "class"], "every": 2, "max_tokens": 6}
    config["eval"] = {"tasks": str(tasks), "n": 2, "k": [1, 2], "completion": True, "max_tokens": 3, "stop": ["\n"]}
    config["eval"] |= {"temperature": 1.0} | eval_keys
    return config


def test_the_run_is_the_same_with_and_without(texts: Path, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        for name in ("plain", "seen"):
            config = watched(texts, tmp_path / f"{name}-{dtype}", every=1)
            config["model"]["dtype"] = dtype
            config["samples"]["every"] = 1
            if name == "plain":
                del config["samples"], config["eval"]
            train(config)
        plain, seen = (tmp_path / f"{name}-{dtype}" for name in ("plain", "seen"))
        assert weights(seen / "model") == weights(plain / "model")
        assert all(same_checkpoint(seen, plain, step) for step in (1, 2, 3, 4))


def test_what_is_logged_is_what_the_weights_write(texts: Path, tmp_path: Path) -> None:
    config = watched(texts, tmp_path / "run")
    train(config)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    drawn = {(m["step"], m["prompt"]): m["text"] for m in rows if m["kind"] == "sample"}
    assert sorted(drawn) == [(step, prompt) for step in (0, 2, 4) for prompt in ("class", "def value")]
    params = fastsft.SamplingParams(max_tokens=6)
    for step, folder in ((2, "checkpoints/step-00000002/model"), (4, "model")):
        llm = fastsft.LLM(tmp_path / "run" / folder)
        for prompt in ("class", "def value"):
            assert drawn[step, prompt] == llm.generate(prompt, params)[0].outputs[0].text
    assert len({drawn[step, "class"] for step in (0, 2, 4)}) > 1, "the weights have changed"
    passed = [m for m in rows if m["kind"] == "pass_at_k"]
    assert [m["step"] for m in passed] == [0, 4]
    for row in passed:
        assert row["passed"] == {"passes": 2, "fails": 0}
        assert row["pass_at"] == {"1": 0.5, "2": 0.5}
        assert row["statuses"] == {"ok": 2, "wrong": 2}


def test_refusals_come_before_the_training(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = watched(texts, tmp_path / "run")
    (tmp_path / "empty.jsonl").write_text("")
    for path, message in (("absent", "no file"), ("empty.jsonl", "no task"), ("bad.jsonl", "bad.jsonl:1: expected")):
        (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n')
        with pytest.raises(ConfigError, match=rf"eval\.tasks: .*{message}"):
            Trainer(load_config(config | {"eval": {"tasks": str(tmp_path / path)}}), progress=False)
    monkeypatch.setattr(live, "run", lambda code: SandboxResult("refused", "", "no isolation here", 0.0, ()))
    with pytest.raises(ConfigError, match=r"eval\.tasks: sandbox: no isolation here"):
        Trainer(load_config(config), progress=False)
    with pytest.raises(ConfigError, match=r"eval\.k: expected numbers from 1 to eval\.n = 2"):
        load_config(watched(texts, tmp_path / "run", k=[3]))
