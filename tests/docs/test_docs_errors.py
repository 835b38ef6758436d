"""errors.md quotes messages that the package has: what can be provoked cheaply is, the others are in its source."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from docs_pages import DOCS, ROOT

import fastsft
from fastsft import ops
from fastsft.config import load_config


def _quoted() -> list[str]:
    """The messages in the first columns. Torch's own and what is no message are left out."""
    rows = re.findall(r"^\| (.*?) \| .* \| .* \|$", (DOCS / "errors.md").read_text(encoding="utf-8"), re.M)
    return [q for row in rows for q in re.findall(r"`([^`]+)`", row) if " " in q and not q.startswith("Could not run")]


@functools.cache
def _templates() -> list[re.Pattern[str]]:
    """Every text of the package that has enough words to be known by; anything may stand for its values."""
    found = []
    for file in (ROOT / "python").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [p.value if isinstance(p, ast.Constant) else "\0" for p in parts]
            if all(isinstance(t, str) for t in texts) and len(text := " ".join("".join(texts).split())) > 10:
                found.append(re.compile(".+".join(map(re.escape, text.split("\0")))))
    return [t for t in found if len(t.pattern.replace(".+", "")) > 16 or ".+" not in t.pattern]


def test_there_are_messages() -> None:
    assert len(_quoted()) > 50


@pytest.mark.parametrize("message", _quoted())
def test_a_message_is_in_the_source(message: str) -> None:
    if not any(message.startswith(start) for start in PROVOKED):
        built = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
        assert message in built or any(t.fullmatch(message) for t in _templates())


def _run(**tables: Any) -> Callable[[], Any]:
    model = {
        "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    }  # fmt: skip
    raw: dict[str, Any] = {
        "model": {"init": model | tables.pop("init", {})},
        "tokenizer": {"train_vocab": 300},
        "data": {"train": ["rows.jsonl"], "max_length": 64} | tables.pop("data", {}),
    }
    return lambda: fastsft.train(raw | tables)


def _written(name: str, text: str) -> Path:
    Path(name).write_text(text)
    return Path(name)


def _rows(text: str, **tables: Any) -> Callable[[], Any]:
    def train() -> None:
        _written("rows.jsonl", text)
        _run(**tables)()

    return train


_Q = torch.zeros(4, 2, 64)
_CU = torch.tensor([0, 4], dtype=torch.int32)
_HIDDEN, _HEAD, _TARGETS = torch.zeros(4, 8), torch.zeros(10, 8), torch.tensor([1, 2, 3, 4])
PROVOKED: dict[str, Callable[[], Any]] = {
    "config: unknown key": lambda: load_config({"data": {"trian": []}}),
    "config: ...: expected": lambda: load_config({"optim": {"lr": -1}}),
    "...: not valid TOML": lambda: load_config(_written("run.toml", "output = runs")),
    "config: train.tokens_per_batch": lambda: load_config({"train": {"tokens_per_batch": 10}}),
    "config: model: give either": lambda: load_config({"model": {"path": "x", "init": {"hidden_size": 64}}}),
    "config: tokenizer.train_vocab": lambda: load_config({"model": {"path": "x"}, "tokenizer": {"train_vocab": 300}}),
    "data.max_length: expected at most": _rows('{"text": "a"}\n', data={"max_length": 100}),
    "model: head_dim": _rows('{"text": "a"}\n', init={"head_dim": 48}),
    "...: model_type": _rows('{"text": "a"}\n', init={"model_type": "gpt2"}),
    "...: unknown format": _rows('{"question": "a", "answer": "b"}\n'),
    "...: broken JSON": _rows('{"text": "a"\n'),
    "... (data.max_bad above 0": _rows('{"text": 1}\n'),
    "...: no usable row": _rows('{"text": "def add(a, b):"}\n', data={"max_length": 4}),
    "...: too long": _rows('{"text": "def add(a, b):"}\n', data={"max_length": 4, "on_long": "fail"}),
    "...: expected a folder with config.json": lambda: fastsft.LLM("Qwen/Qwen2.5-Coder-0.5B"),
    "SamplingParams": lambda: fastsft.SamplingParams(temperature=-1),
    "varlen_attention: cu_seqlens_q: expected int32": lambda: ops.varlen_attention(_Q, _Q, _Q, _CU.long()),
    "varlen_attention: cu_seqlens_q: expected the last": lambda: ops.varlen_attention(_Q, _Q, _Q, _CU + _CU),
    "varlen_attention: q: expected [Tq": lambda: ops.varlen_attention(_Q[None], _Q[None], _Q[None], _CU),
    "varlen_attention: q: expected a head": lambda: ops.varlen_attention(*[torch.zeros(4, 2, 48)] * 3, _CU),
    "linear_cross_entropy: targets": lambda: ops.linear_cross_entropy(_HIDDEN, _HEAD, _TARGETS + 9),
    "linear_cross_entropy: weight": lambda: ops.linear_cross_entropy(_HIDDEN, _HEAD.bfloat16(), _TARGETS),
    "linear_cross_entropy: ref_logprobs": lambda: ops.linear_cross_entropy(_HIDDEN, _HEAD, _TARGETS, objective="k3"),
    "...: expected text that UTF-8": lambda: ops.minhash_signatures(["\ud800"]),
}


@pytest.mark.parametrize("start", PROVOKED)
def test_a_message_comes_as_quoted(start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (quoted,) = (q for q in _quoted() if q.startswith(start))
    pattern = ".*".join(map(re.escape, re.split(r"\.\.\.", quoted)))
    with pytest.raises(ValueError, match=f"(?s)^{pattern}"):
        PROVOKED[start]()
