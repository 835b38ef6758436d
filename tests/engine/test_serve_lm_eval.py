"""lm-evaluation-harness' own client for local servers, where it is installed, against the model's log-probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_cases import Reference, write_model
from serve_cases import MODEL, serving

from fastsft.engine.llm import LLM
from fastsft.engine.request import SamplingParams

pytest.importorskip("lm_eval")

PAIRS = [("the cat", " sat on"), ("on the mat", " the cat sat"), ("x", " y"), ("the cat sat on the mat", " mat")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("evaluated") / "llama", "llama")


@pytest.mark.parametrize("concurrent", [1, 3])
def test_local_completions(concurrent: int, folder: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    def ask(kind: str, arguments: list[Any]) -> list[Any]:
        return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]

    model, llm = Reference(folder), LLM(folder, num_blocks=64)
    greedy = llm.generate("the cat", SamplingParams(max_tokens=3, skip_special_tokens=False)).pop().outputs[0]
    with serving(folder) as server:
        client = LocalCompletionsAPI(
            model=MODEL, base_url=f"{server.url}/v1/completions", tokenizer_backend="huggingface", batch_size=2,
            tokenizer=str(folder), num_concurrent=concurrent, max_length=200,
        )  # fmt: skip
        pairs = [*PAIRS, ("the cat", greedy.text)]
        found = client.loglikelihood(ask("loglikelihood", pairs))
        for (context, continuation), (total, is_greedy) in zip(pairs, found, strict=True):
            before, after = client._encode_pair(context, continuation)
            rows = model.logprobs([*before, *after])[len(before) - 1 : -1]
            assert total == pytest.approx(sum(float(row[i]) for row, i in zip(rows, after, strict=True)), abs=1e-3)
            assert is_greedy == all(int(row.argmax()) == i for row, i in zip(rows, after, strict=True))
        assert found[-1][1]
        options = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
        (text,) = client.generate_until(ask("generate_until", [("the cat", options)]))
        assert text == llm.generate("the cat", SamplingParams(max_tokens=6, stop="\n"))[0].outputs[0].text
