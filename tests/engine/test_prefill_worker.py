"""Prompts computed by another process: the results are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import as_prompts, assert_nothing_held, engine, prompts_of, write_model
from prefill_cases import requests, worker_of

from fastsft.engine.request import Request, SamplingParams
from fastsft.engine.runner import Inputs
from fastsft.models.weights import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "qwen3", "qwen3")


@pytest.mark.parametrize(
    "options",
    [
        {}, {"max_batched_tokens": 13}, {"num_blocks": 24}, {"quantization": "w8a8", "kv_cache_dtype": "int8"},
        {"dtype": torch.bfloat16, "speculative_config": {"method": "ngram", "adaptive": False}, "prefill_threads": 2},
    ],
    ids=["wide", "chunks", "little room", "w8a8", "drafts"],
)  # fmt: skip
def test_the_results_are_those_of_one_process(options: dict[str, Any], folder: Path, adapters: dict[str, Path]) -> None:
    prompts, params, names = requests()
    plain = {k: v for k, v in options.items() if k != "prefill_threads"}
    expected = engine(folder, adapters=adapters, **plain).generate(prompts, params, adapter=names)
    llm = engine(folder, adapters=adapters, **{"prefill_threads": 1} | options)
    assert llm.generate(prompts, params, adapter=names) == expected
    assert worker_of(llm.core).pid is not None
    assert llm.generate(prompts, params, adapter=names) == expected
    assert_nothing_held(llm)


def test_new_weights_and_adapters_reach_the_worker(folder: Path, adapters: dict[str, Path]) -> None:
    prompts, params, _ = requests()
    model = load_model(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    found = []
    for threads in (0, 1):
        llm = engine(folder, prefill_threads=threads)
        outputs = [llm.generate(prompts, params)]
        llm.core.add_adapter("b", adapters["a"])
        outputs.append(llm.generate(prompts, params, adapter="b"))
        llm.update_weights(model)
        outputs += [llm.generate(prompts, params), llm.generate(prompts, params, adapter="b")]
        found.append(outputs)
        llm.core.remove_adapter("b")
        assert not threads or not worker_of(llm.core)._adapters
    assert found[0] == found[1]
    assert found[0][0] != found[0][2]


def test_a_worker_that_is_quicker_than_the_step_beside_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt may find blocks that the step which admits it fills: it must not be computed before them."""
    (first,) = prompts_of([31], 1)
    one = SamplingParams(max_tokens=1, ignore_eos=True)
    token = engine(folder).generate(as_prompts([first]), one)[0].outputs[0].token_ids
    second = [*first, *token, *prompts_of([40], 2)[0]]
    several = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=0)
    alone = engine(folder).generate(as_prompts([second]), several)[0].outputs[0]

    llm = engine(folder, prefill_threads=1)
    core, worker = llm.core, worker_of(llm.core)
    submit = worker.submit

    def submit_and_wait(inputs: Inputs) -> None:
        submit(inputs)
        assert worker._process is not None
        worker._process[1].poll(30)

    monkeypatch.setattr(worker, "submit", submit_and_wait)
    core.add(Request("first", tuple(first), SamplingParams(max_tokens=20, ignore_eos=True)))
    found = []
    while core.busy:
        updates = core.step()
        if not found and any(u.request_id == "first" for u in updates) and not core.stats().waiting:
            core.add(Request("second", tuple(second), several))
            found.append(None)
        found += [u for u in updates if u.request_id == "second"]
    logprobs = [p for u in found if u is not None for p in u.logprobs or ()]
    assert logprobs == list(alone.logprobs or ())
    assert core.stats().found_tokens == 32


def test_a_server_with_a_worker(folder: Path) -> None:
    """It is forked from the engine's thread, while connections are open, which it must not keep."""
    pytest.importorskip("fastapi", reason="part of the serve extra")
    import httpx
    from serve_cases import serving

    prompts = prompts_of([60, 70, 80, 90])
    options = SamplingParams(max_tokens=10, temperature=1.0, seed=3)
    expected = [o.outputs[0].text for o in engine(folder).generate(as_prompts(prompts), options)]
    with serving(folder, prefill_threads=1) as server:
        body = {"prompt": prompts, "max_tokens": 10, "temperature": 1.0, "seed": 3}
        for _ in range(2):
            answer = httpx.post(f"{server.url}/v1/completions", json=body, headers={"Connection": "close"}, timeout=30)
            assert [c["text"] for c in answer.json()["choices"]] == expected
        worker = worker_of(server.core)
        assert worker.pid is not None


def test_what_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="prefill_threads: expected 0, or on Linux a positive number, got -1"):
        engine(folder, prefill_threads=-1)
