"""Log-probabilities of a prompt: the model's own, whatever the chunks, the cache and the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_cases import Reference, as_prompts, assert_nothing_held, engine, prompts_of, write_model

from fastsft.engine.request import SamplingParams
from fastsft.models.weights import load_model

PROMPTS = prompts_of([1, 2, 40, 33, 40])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("scored") / "qwen2", "qwen2")


def params(**options: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 4, "prompt_logprobs": 3, **options})


@pytest.mark.parametrize("budget", [7, 64, 4096])
def test_they_are_the_models(budget: int, folder: Path) -> None:
    llm = engine(folder, max_batched_tokens=budget)
    model = Reference(folder)
    for output in llm.generate(as_prompts(PROMPTS), params(n=2)):
        expected, found = model.logprobs(list(output.prompt_token_ids)), output.prompt_logprobs
        assert found is not None
        assert len(found) == len(output.prompt_token_ids)
        assert found[0] is None
        for t, (token, shown) in enumerate(zip(output.prompt_token_ids[1:], found[1:], strict=True)):
            assert shown is not None
            best = expected[t].topk(3).indices.tolist()
            assert set(shown) == {token, *best}
            assert shown == {i: pytest.approx(float(expected[t, i]), abs=1e-4) for i in shown}
    assert_nothing_held(llm)


def test_the_cache_changes_nothing(folder: Path) -> None:
    """A prompt whose blocks could be found is computed again; one that is preempted half-way is scored once."""
    llm = engine(folder)
    first = llm.generate(as_prompts(PROMPTS), params())
    second = llm.generate(as_prompts(PROMPTS), params())
    assert [o.prompt_logprobs for o in second] == [o.prompt_logprobs for o in first]
    plain = llm.generate(as_prompts(PROMPTS), SamplingParams(max_tokens=4))
    assert [o.prompt_logprobs for o in plain] == [None] * 5
    assert [o.outputs for o in plain] == [o.outputs for o in first]
    tiny = engine(folder, num_blocks=8, max_batched_tokens=16)
    mixed = [params(max_tokens=60, seed=i, prompt_logprobs=3 if i % 2 else None) for i in range(5)]
    found = tiny.generate(as_prompts(PROMPTS), mixed)
    assert tiny.core.stats().preemptions
    for i, output in enumerate(found):
        assert output.prompt_logprobs == (first[i].prompt_logprobs if i % 2 else None)


def test_few_rows_of_a_step_have_logits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are a step's memory. Who does not ask for them does not wait for those who do."""
    prompts = prompts_of([60] * 8 + [1, 2, 90, 30], seed=3)
    asked = [params(max_tokens=1) for _ in prompts[:-1]] + [SamplingParams(max_tokens=1)]
    expected = [engine(folder).generate(p, one)[0] for p, one in zip(as_prompts(prompts), asked, strict=True)]
    llm = engine(folder)
    runner, rows, tokens = llm.core._runner, [], []

    def forward(inputs: Any, rows_R: Any, hidden_RD: Any = None) -> Any:
        rows.append(len(rows_R))
        tokens.append(inputs.ids_T.tolist())
        return type(runner).forward(runner, inputs, rows_R, hidden_RD)

    monkeypatch.setattr(runner, "forward", forward)
    assert llm.generate(as_prompts(prompts), asked) == expected
    assert rows == [256 + 2, 256, 60]  # in the first step, those that have nothing to score
    assert tokens[0][-30:] == prompts[-1]
    assert_nothing_held(llm)


def test_new_weights_score_all_of_it(folder: Path, tmp_path: Path) -> None:
    from fastsft.engine.assemble import Assembly
    from fastsft.engine.request import Request

    llm = engine(folder, max_batched_tokens=16)
    request = Request("a", tuple(PROMPTS[2]), params())
    llm.core.add(request)
    assert llm.core.step() == []  # the first 16 tokens
    import torch

    model = load_model(folder, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head_weight.mul_(0.5)
    llm.core.update_weights(model)
    assembly = Assembly(request)
    while llm.core.busy:
        for update in llm.core.step():
            assembly.take(update)
    whole = llm.generate({"prompt_token_ids": PROMPTS[2]}, params())[0]
    assert assembly.output().prompt_logprobs == whole.prompt_logprobs
