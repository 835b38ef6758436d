"""Heads trained beside a model on generated code: a step brings more with their drafts than with the n-gram ones."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import fastsft
from fastsft.engine.llm import LLM
from fastsft.engine.request import RequestOutput, SamplingParams

NAMES = ["total", "value", "index", "count", "items", "result", "limit", "left", "right", "size"]
OPERATORS = ["+", "-", "*", "//", "%"]


def program(rng: random.Random) -> str:
    """A few functions whose names and operators are drawn, and whose grammar is to be learnt."""
    parts = []
    for _ in range(rng.randint(2, 4)):
        name, a, b, c = rng.sample(NAMES, 4)
        first, second = rng.choices(OPERATORS, k=2)
        body = rng.choice(
            [
                f"    {c} = {a} {first} {b}\n    return {c} {second} {rng.randint(1, 9)}\n",
                f"    for {c} in range({a}):\n        {b} = {b} {first} {c}\n    return {b}\n",
                f"    if {a} > {b}:\n        return {a} {first} {b}\n    return {b} {second} {a}\n",
                f"    while {a} < {b}:\n        {a} = {a} {first} {rng.randint(1, 9)}\n    return {a}\n",
            ]
        )
        parts.append(f"def {name}_of({a}, {b}):\n{body}")
    return "\n\n".join(parts)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 0.2 M parameters and three heads."""
    folder = tmp_path_factory.mktemp("run")
    rng = random.Random(0)
    rows = "".join(json.dumps({"text": program(rng)}) + "\n" for _ in range(600))
    (folder / "train.jsonl").write_text(rows)
    config: dict[str, Any] = {
        "output": str(folder / "run"),
        "model": {
            "dtype": "float32",
            "init": {
                "model_type": "qwen3", "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 512,
                "tie_word_embeddings": True,
            },
        },
        "tokenizer": {"train_vocab": 320},
        "data": {"train": [str(folder / "train.jsonl")], "max_length": 400, "eval_fraction": 0.02},
        "optim": {"lr": 5e-3},
        "draft": {"heads": 3, "lr": 3e-2},
        "train": {"tokens_per_batch": 2048, "epochs": 100, "max_steps": 200, "eval_every": 0, "save_every": 0},
    }  # fmt: skip
    fastsft.train(config)
    return folder / "run"


def generated(run: Path, params: SamplingParams, config: dict[str, Any] | None) -> tuple[list[RequestOutput], LLM]:
    llm = LLM(run / "model", num_blocks=512, speculative_config=config)
    rng = random.Random(1)
    prompts = [program(rng)[:60] for _ in range(12)]
    return llm.generate(prompts, params), llm


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_step_brings_more_than_with_what_occurred_before(temperature: float, run: Path) -> None:
    params = SamplingParams(max_tokens=96, temperature=temperature, seed=3, ignore_eos=True)
    plain, _ = generated(run, params, None)
    drafters: dict[str, dict[str, Any]] = {
        "heads": {"method": "heads", "model": run / "heads"},
        "pairs": {"method": "ngram", "prompt_lookup_min": 2},
        "tokens": {"method": "ngram", "prompt_lookup_min": 1},
    }
    held, each_step = dict[str, float](), dict[str, float]()
    for name, config in drafters.items():
        found, llm = generated(run, params, config | {"adaptive": False, "num_speculative_tokens": 3})
        assert found == plain
        stats = llm.core.stats()
        held[name] = stats.accepted_tokens / stats.drafted_tokens
        each_step[name] = stats.generated_tokens / (stats.generated_tokens - stats.accepted_tokens)
    # Of pairs there are guesses in few steps, so that their share that holds says less than tokens of a step do.
    assert held["heads"] > 1.2 * held["tokens"]
    assert each_step["heads"] > 1.2 * max(each_step["pairs"], each_step["tokens"])
