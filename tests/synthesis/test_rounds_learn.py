"""Two rounds with a real model, engine, sandbox and trainer: pass@1 rises on tasks that were never sampled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fastsft
from fastsft import cli

FUNCTIONS = {
    "inc": ("x + 1", "8"), "dec": ("x - 1", "6"), "neg": ("-x", "-7"), "dbl": ("2 * x", "14"), "sqr": ("x * x", "49"),
    "odd": ("x % 2", "1"), "lst": ("[x]", "[7]"), "txt": ("str(x)", "'7'"),
}  # fmt: skip


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def conversation(ask: str, name: str, body: str) -> dict[str, Any]:
    answer = f"def {name}(x): return {body}"
    return {"messages": [{"role": "user", "content": f"{ask} {name}"}, {"role": "assistant", "content": answer}]}


def tasks(ask: str) -> list[dict[str, Any]]:
    return [{"task_id": f"{ask} {name}", "prompt": f"{ask} {name}", "check": f"assert {name}(7) == {value}"}
            for name, (_, value) in FUNCTIONS.items()]  # fmt: skip


def test_pass_at_1_rises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first model was shown two wrong answers for each right one, and so prefers the wrong one."""
    shown = [conversation(ask, name, body) for ask in ("Write", "Give") for name, (right, _) in FUNCTIONS.items()
             for body in ("None", right, "None")]  # fmt: skip
    model = {
        "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True,
        "max_position_embeddings": 64,
    }  # fmt: skip
    run: dict[str, Any] = {
        "data": {"max_length": 64, "eval_fraction": 0.0}, "optim": {"lr": 5e-3}, "schedule": {"warmup": 0.1},
        "train": {"tokens_per_batch": 2048, "epochs": 200, "max_steps": 150, "eval_every": 0, "save_every": 0},
    }  # fmt: skip
    start = {
        **run, "output": str(tmp_path / "start"), "model": {"init": model, "dtype": "float32"},
        "tokenizer": {"train_vocab": 300},
        "data": {**run["data"], "train": [lines(tmp_path / "start.jsonl", shown)]},
    }  # fmt: skip
    first = fastsft.train(start, progress=False).model_path
    plan = f"""
output = {str(tmp_path / "rounds")!r}
model = {str(first)!r}
tasks = [{lines(tmp_path / "tasks.jsonl", tasks("Write"))!r}]
held_out = [{lines(tmp_path / "held_out.jsonl", tasks("Give"))!r}]
rounds = 2
[draw]
n = 12
temperature = 1.0
max_tokens = 40
seconds = 30.0
[select]
near_all = 0
[run.model]
dtype = "float32"
[run.data]
max_length = 64
eval_fraction = 0.0
[run.optim]
lr = 2e-3
[run.train]
tokens_per_batch = 1024
epochs = 100
max_steps = 20
eval_every = 0
"""
    (tmp_path / "plan.toml").write_text(plan)
    capsys.readouterr()
    cli.main(["iterate", str(tmp_path / "plan.toml"), "--json"])
    rounds = json.loads(capsys.readouterr().out)
    rates = [r["held_out_pass_at_1"] for r in rounds]
    assert rates[0] <= 0.25
    assert rates[2] >= 0.75
    passed = [r["sampling"]["passed"] for r in rounds[1:]]
    assert 15 <= passed[0] <= 50  # a third of 96, as shown
    assert passed[1] > 70
    cli.main(["iterate", str(tmp_path / "plan.toml")])
    table = capsys.readouterr().out
    assert f"{rates[2]:.3f}" in table
    assert str(tmp_path / "rounds" / "round-2" / "run" / "model") in table.replace("\n", "")
