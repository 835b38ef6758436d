"""The engine on a GPU: its texts beside those of the CPU, and of graphs beside those without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import as_prompts, assert_nothing_held, engine, prompts_of, tokenizer, write_model

from fastsft.engine.llm import LLM
from fastsft.engine.request import SamplingParams
from fastsft.models.weights import init_model, load_model

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
GREEDY: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True}
SAMPLED: dict[str, Any] = {**GREEDY, "temperature": 0.8, "seed": 3}


@pytest.fixture(scope="module", params=["llama", "qwen3", "mistral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / request.param, request.param)


def texts(llm: LLM, prompts: list[list[int]], **params: Any) -> list[list[tuple[int, ...]]]:
    outputs = llm.generate(as_prompts(prompts), SamplingParams(**params))
    assert_nothing_held(llm)
    return [[o.token_ids for o in r.outputs] for r in outputs]


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SAMPLED,
        {**SAMPLED, "n": 3},
        {**SAMPLED, "top_p": 0.9, "top_k": 30},
        {**GREEDY, "frequency_penalty": 0.5},
    ],
    ids=["greedy", "sampled", "n", "filtered", "penalised"],
)
def test_texts_in_float32_are_the_cpu_s(params: dict[str, Any], folder: Path) -> None:
    prompts = prompts_of([5, 40, 70, 16])
    llm = engine(folder, device=DEVICE, max_batched_tokens=33, num_blocks=20)
    assert texts(llm, prompts, **params) == texts(engine(folder), prompts, **params)


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_graphs_change_no_text(quantization: str | None, folder: Path) -> None:
    """Twice: the second time from cached prefixes."""
    prompts = prompts_of([5, 40, 70, 16, 33])
    options: dict[str, Any] = {"device": DEVICE, "dtype": torch.bfloat16, "quantization": quantization}
    llm = engine(folder, max_num_seqs=6, num_blocks=20, **options)
    plain = engine(folder, max_num_seqs=6, num_blocks=20, enforce_eager=True, **options)
    for params in (GREEDY, {**SAMPLED, "n": 2}):
        expected = texts(plain, prompts, **params)
        assert texts(llm, prompts, **params) == expected
        assert texts(llm, prompts, **params) == texts(plain, prompts, **params)
    stats = llm.core.stats()
    assert stats.graph_steps > 20
    assert stats.warm_up_seconds > 0
    assert plain.core.stats().graph_steps == plain.core.stats().warm_up_seconds == 0


def test_new_weights_under_captured_graphs(folder: Path) -> None:
    prompts = prompts_of([9, 20])
    new = init_model(load_model(folder).config, seed=8, dtype=torch.bfloat16)
    llm = engine(folder, device=DEVICE, dtype=torch.bfloat16)
    texts(llm, prompts, **GREEDY)
    replayed = llm.core.stats().graph_steps
    llm.update_weights(new)
    fresh = LLM(new, tokenizer(), device=DEVICE, num_blocks=64)
    assert texts(llm, prompts, **GREEDY) == texts(fresh, prompts, **GREEDY)
    assert llm.core.stats().graph_steps > replayed


def test_scores_in_bfloat16_are_near_the_cpu_s(folder: Path) -> None:
    prompts = as_prompts(prompts_of([40, 25]))
    ours, theirs, exact = (
        torch.tensor([x for each in engine(folder, **options).score(prompts) for x in each])
        for options in ({"device": DEVICE, "dtype": torch.bfloat16}, {"dtype": torch.bfloat16}, {})
    )
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_engines_on_two_devices(folder: Path) -> None:
    """Each captures on its own, whichever captured first."""
    prompts = prompts_of([5, 40, 16])
    llms = [engine(folder, device=f"cuda:{i}", dtype=torch.bfloat16) for i in range(2)]
    first, second, again = (texts(llms[i], prompts, **SAMPLED) for i in (0, 1, 0))
    assert first == second == again
    assert all(llm.core.stats().graph_steps for llm in llms)
