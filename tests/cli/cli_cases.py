"""Tiny rows and a tiny run, and a command's result or its one line of refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastsft import cli

Rows = list[dict[str, Any]]


def write(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def conversations(count: int) -> Rows:
    return [
        {"messages": [{"role": "user", "content": f"say number {i}"}, {"role": "assistant", "content": f"number {i}!"}]}
        for i in range(count)
    ]


def run_file(folder: Path, data: Path, **train: Any) -> Path:
    steps = "\n".join(f"{k} = {v}" for k, v in {"max_steps": 2, "tokens_per_batch": 256, **train}.items())
    path = folder / "run.toml"
    path.write_text(
        f"""output = {str(folder / "run")!r}
[model]
dtype = "float32"
[model.init]
model_type = "qwen2"
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 32
max_position_embeddings = 256
tie_word_embeddings = true
[tokenizer]
train_vocab = 300
[data]
train = [{str(data)!r}]
max_length = 128
eval_fraction = 0.2
[train]
{steps}
"""
    )
    return path


def result_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    capsys.readouterr()
    cli.main([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The message of a command that must fail with status 2, one line and no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main([*map(str, arguments)])
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    message = captured.err.strip().splitlines()
    assert len(message) == 1, captured.err
    assert message[0].startswith("fastsft: ")
    return message[0].removeprefix("fastsft: ")
