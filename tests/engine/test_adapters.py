"""Adapters per request: what each generates, whatever shares its steps and its cache."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from engine_cases import (
    adapted,
    as_prompts,
    assert_nothing_held,
    engine,
    prompts_of,
    tokenizer,
    write_adapters,
    write_model,
)

from fastsft.engine.assemble import Assembly
from fastsft.engine.llm import LLM
from fastsft.engine.request import PromptError, Request, SamplingParams
from fastsft.models.lora import merge_lora

NAMES = ("red", "green")
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "qwen3", "qwen3")


@pytest.fixture(scope="module")
def adapters(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_adapters(folder, tmp_path_factory.mktemp("adapters"), *NAMES)


def test_an_adapter_is_the_merged_model(folder: Path, adapters: dict[str, Path]) -> None:
    prompts = as_prompts(prompts_of([5, 40, 70]))
    llm = engine(folder, adapters=adapters)
    for seed, name in enumerate(NAMES):
        merged = adapted(folder, seed)
        merge_lora(merged)
        expected = LLM(merged, tokenizer(), num_blocks=64).generate(prompts, GREEDY)
        for ours, theirs in zip(llm.generate(prompts, GREEDY, adapter=name), expected, strict=True):
            (a,), (b,) = ours.outputs, theirs.outputs
            assert a.token_ids == b.token_ids
            assert a.logprobs is not None
            assert b.logprobs is not None
            for mine, its in zip(a.logprobs, b.logprobs, strict=True):
                assert mine == pytest.approx(its, abs=1e-4)
    plain = engine(folder).generate(prompts, GREEDY)
    assert llm.generate(prompts, GREEDY) == plain
    assert llm.generate(prompts, GREEDY, adapter="red")[0].outputs[0].token_ids != plain[0].outputs[0].token_ids


@pytest.mark.parametrize("options", [{}, {"max_batched_tokens": 13, "num_blocks": 12}, {"quantization": "w8a8"}])
def test_a_request_has_the_bits_that_it_has_alone(
    options: dict[str, Any], folder: Path, adapters: dict[str, Path]
) -> None:
    source = random.Random(4)
    (trunk,) = prompts_of([64], seed=1)
    asked = []
    for i in range(18):
        begin, (end,) = trunk[: source.choice([16, 33, 64])], prompts_of([source.choice([1, 2, 15])], seed=50 + i)
        params = SamplingParams(
            temperature=source.choice([0.0, 1.0]), seed=i, n=source.choice([1, 3]), logprobs=3, ignore_eos=True,
            max_tokens=source.randint(1, 20),
        )  # fmt: skip
        asked.append(Request(f"{i}", (*begin, *end), params, adapter=source.choice([None, *NAMES])))
    shared = engine(folder, adapters=adapters, **options)
    together = {one.request_id: Assembly(one) for one in asked}
    left = list(asked)
    while left or shared.core.busy:
        for _ in range(source.choice([0, 1, 4])):
            if left:
                shared.core.add(left.pop(0))
        for update in shared.core.step():
            together[update.request_id].take(update)
    alone = options | {"num_blocks": 64}
    for one in asked:
        llm = engine(folder, adapters=adapters, **alone)
        prompt = {"prompt_token_ids": one.prompt_token_ids}
        expected = llm.generate(prompt, one.params, adapter=one.adapter)[0].outputs
        assert together[one.request_id].output().outputs == expected, one.request_id
    stats = shared.core.stats()
    assert stats.found_tokens > 200
    assert (stats.preemptions > 0) == ("num_blocks" in options)
    assert_nothing_held(shared)


def test_adapters_come_and_go(folder: Path, adapters: dict[str, Path]) -> None:
    (prompt,) = prompts_of([40])
    llm = engine(folder, adapters={"x": adapters["red"]})

    def generate(adapter: str | None) -> tuple[int, ...]:
        return llm.generate({"prompt_token_ids": prompt}, GREEDY, adapter=adapter)[0].outputs[0].token_ids

    red, plain = generate("x"), generate(None)
    under_way = {name: Assembly(Request(name, tuple(prompt), GREEDY, adapter="x")) for name in ("old", "new")}
    llm.core.add(under_way["old"].request)
    for update in llm.core.step():
        under_way["old"].take(update)
    llm.core.add_adapter("x", adapted(folder, 1))  # what the folder of "green" holds
    llm.core.add(under_way["new"].request)
    llm.core.add_adapter("y", adapters["red"])
    assert llm.core.adapters == ("x", "y")
    llm.core.remove_adapter("x")
    while llm.core.busy:
        for update in llm.core.step():
            under_way[update.request_id].take(update)
    green = under_way["new"].output().outputs[0].token_ids
    assert under_way["old"].output().outputs[0].token_ids == red
    assert generate("y") == red
    assert generate(None) == plain
    assert len({red, green, plain}) == 3
    other = engine(folder, adapters=adapters)
    assert green == other.generate(as_prompts([prompt]), GREEDY, adapter="green")[0].outputs[0].token_ids


def test_each_prompt_may_have_its_own(folder: Path, adapters: dict[str, Path]) -> None:
    llm, prompts = engine(folder, adapters=adapters), as_prompts(prompts_of([30, 30, 30]))
    names: list[str | None] = ["green", None, "red"]
    together = llm.generate(prompts, GREEDY, adapter=names)
    assert together == [llm.generate([p], GREEDY, adapter=n)[0] for p, n in zip(prompts, names, strict=True)]


def test_what_is_refused(folder: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    llm, prompts = engine(folder, adapters=adapters), as_prompts(prompts_of([3, 3]))
    with pytest.raises(PromptError, match=r"expected an adapter of the engine \('red', 'green'\), got 'blue'"):
        llm.generate(prompts, GREEDY, adapter="blue")
    with pytest.raises(ValueError, match="generate: adapter: expected 2, one per prompt, got 1"):
        llm.generate(prompts, GREEDY, adapter=["red"])
    with pytest.raises(ValueError, match="remove_adapter: name: expected one of"):
        llm.core.remove_adapter("blue")
    with pytest.raises(ValueError, match="add_adapter: name: expected a text, got an empty one"):
        llm.core.add_adapter("", adapters["red"])
    with pytest.raises(ValueError, match="not readable JSON"):
        engine(folder, adapters={"none": tmp_path})
    assert_nothing_held(llm)
