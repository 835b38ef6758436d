"""Log-probabilities of given texts: to the bit those of drawing them, and near those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import (
    SHAPE,
    Reference,
    as_prompts,
    assert_nothing_held,
    engine,
    prompts_of,
    write_adapters,
    write_model,
)

from fastsft.engine.request import PromptError, SamplingParams


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "qwen2", "qwen2")


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapters(folder, tmp_path_factory.mktemp("adapters"), "a")["a"]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.bfloat16, "speculative_config": {"method": "ngram", "adaptive": False}},
        {"quantization": "w8a8", "kv_cache_dtype": "int8", "max_batched_tokens": 17},
        {"quantization": "int4"},
    ],
    ids=["float32", "bfloat16", "w8a8", "int4"],
)
def test_a_rollout_scores_what_it_reported(options: dict[str, Any], threads: int, folder: Path, adapter: Path) -> None:
    from fastsft import _C

    names: list[str | None] = [None, "a", None, "a"]
    prompts = prompts_of([1, 20, 33, 64])
    common: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "max_tokens": 30, "ignore_eos": True, "logprobs": 0}
    params = [SamplingParams(seed=i, repetition_penalty=1 + i / 5, **common) for i in range(4)]
    drawing, scoring = (engine(folder, adapters={"a": adapter}, **options) for _ in range(2))
    rollouts = drawing.generate(as_prompts(prompts), params, adapter=names)
    before = _C.num_threads()
    _C.set_num_threads(threads)
    try:
        texts = [[*prompt, *r.outputs[0].token_ids] for prompt, r in zip(prompts, rollouts, strict=True)]
        scores = scoring.score(as_prompts(texts), adapter=names)
    finally:
        _C.set_num_threads(before)
    for prompt, text, rollout, score in zip(prompts, texts, rollouts, scores, strict=True):
        (output,) = rollout.outputs
        assert output.logprobs is not None
        assert len(score) == len(text) - 1
        assert score[len(prompt) - 1 :] == [
            shown[i] for i, shown in zip(output.token_ids, output.logprobs, strict=True)
        ]
    assert_nothing_held(scoring)


def test_scores_are_the_models(folder: Path) -> None:
    texts = prompts_of([2, 17, 64, SHAPE["max_position_embeddings"]])
    model = Reference(folder)
    for ids, score in zip(texts, engine(folder).score(as_prompts(texts)), strict=True):
        expected = model.logprobs(ids)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        assert score == pytest.approx(expected.tolist(), abs=1e-4)


def test_short_and_long_texts(folder: Path) -> None:
    llm = engine(folder)
    (one, many) = prompts_of([1, SHAPE["max_position_embeddings"] + 1])
    assert llm.score(as_prompts([one])) == [[]]
    assert llm.score("the cat") == llm.score(["the cat"])
    with pytest.raises(PromptError, match="empty"):
        llm.score(as_prompts([[]]))
    with pytest.raises(PromptError, match="context"):
        llm.score(as_prompts([many]))
