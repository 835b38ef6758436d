"""The engine over the runner for devices, run here on CPU tensors, beside the one over packed weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import as_prompts, assert_nothing_held, engine, prompts_of, tokenizer, write_heads, write_model
from hypothesis import given
from hypothesis import strategies as st

from fastsft.data.batch import Sample, collate
from fastsft.engine import place
from fastsft.engine.device_runner import DeviceRunner, at_once
from fastsft.engine.llm import LLM
from fastsft.engine.request import SamplingParams
from fastsft.models import device, packed
from fastsft.models.adapter import save_adapter
from fastsft.models.lora import LoraConfig, add_lora, lora_layers
from fastsft.models.weights import init_model, load_model

GREEDY: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True}
SAMPLED: dict[str, Any] = {**GREEDY, "temperature": 0.8, "seed": 3}


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "mistral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / request.param, request.param)


@pytest.fixture(scope="module")
def one_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "llama", "llama")


def device_engine(model: Any, **options: Any) -> LLM:
    """As on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, "PACKED", ())
        llm = engine(model, **options)
    assert isinstance(llm.core._runner, DeviceRunner)
    return llm


def texts(llm: LLM, prompts: list[list[int]], **params: Any) -> list[list[tuple[int, ...]]]:
    outputs = llm.generate(as_prompts(prompts), SamplingParams(**params))
    assert_nothing_held(llm)
    return [[o.token_ids for o in r.outputs] for r in outputs]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, {**SAMPLED, "n": 3}], ids=["greedy", "sampled", "n"])
def test_texts_are_those_of_packed_weights(params: dict[str, Any], folder: Path) -> None:
    """In chunks, with shared prefixes, copies on write and preemption."""
    prompts = prompts_of([5, 40, 70, 16])
    prompts.append([*prompts[2][:50], 9, 9])
    expected = texts(engine(folder), prompts, **params)
    llm = device_engine(folder, max_batched_tokens=33, num_blocks=20)
    assert texts(llm, prompts, **params) == expected
    assert texts(llm, prompts[::-1], **params)[::-1] == expected
    stats = llm.core.stats()
    assert stats.found_tokens
    assert stats.preemptions or "n" not in params


@pytest.mark.parametrize(
    "params",
    [
        {"logprobs": 3, "prompt_logprobs": 2},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "logit_bias": {40: 3.0}},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.02, "temperature": 1.0, "seed": 5},
        {"allowed_token_ids": [40, 41, 42, 43], "temperature": 1.0, "seed": 5, "logprobs": 0},
    ],
    ids=lambda p: next(iter(p)),
)
def test_whatever_is_asked_for(params: dict[str, Any], one_folder: Path) -> None:
    prompts = as_prompts(prompts_of([5, 40]))
    asked = SamplingParams(**GREEDY | params)
    for a, b in zip(
        device_engine(one_folder).generate(prompts, asked), engine(one_folder).generate(prompts, asked), strict=True
    ):
        assert a.outputs[0].token_ids == b.outputs[0].token_ids
        shown = [(*(r.outputs[0].logprobs or ()), *(r.prompt_logprobs or ())[1:]) for r in (a, b)]
        assert len(shown[0]) == len(shown[1])
        for mine, its in zip(*shown, strict=True):
            assert mine == pytest.approx(its, abs=1e-4)


@pytest.mark.parametrize("config", [{"method": "ngram"}, {"method": "suffix"}, {"method": "draft_model"}], ids=str)
def test_speculation(config: dict[str, Any], one_folder: Path) -> None:
    prompts = [p * 3 for p in prompts_of([8, 12])]
    options = {"adaptive": False, **config} | ({"model": one_folder} if config["method"] == "draft_model" else {})
    llm = device_engine(one_folder, speculative_config=options)
    for params in (GREEDY, SAMPLED):
        assert texts(llm, prompts, **params) == texts(engine(one_folder), prompts, **params)
    assert llm.core.stats().drafted_tokens


@pytest.mark.parametrize(
    ("options", "another"),
    [
        ({"quantization": "int8"}, {"dtype": torch.bfloat16}),
        ({"quantization": "int4"}, {"dtype": torch.bfloat16}),
        ({"quantization": "int4", "group_size": 64}, {"quantization": "int4"}),
    ],
    ids=str,
)
def test_quantised_weights(options: dict[str, Any], another: dict[str, Any], one_folder: Path) -> None:
    """The numbers of packed ones: scores differ by the rounding of activations alone, not as those of formats do."""
    prompts = as_prompts(prompts_of([40, 25]))
    ours, packed, other = (
        torch.tensor([x for each in llm.score(prompts) for x in each])
        for llm in (
            device_engine(one_folder, **options),
            engine(one_folder, **options),
            engine(one_folder, **another),
        )
    )
    assert (ours - packed).square().mean().sqrt() < 0.5 * (other - packed).square().mean().sqrt()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=9))
def test_copies_at_once_are_those_one_after_the_other(copies: list[tuple[int, int]]) -> None:
    expected = list("abcdef")
    for source, target in copies:
        expected[target] = expected[source]
    found = torch.arange(6)
    if together := at_once(copies):
        sources, targets = zip(*together, strict=True)
        found[list(targets)] = found[list(sources)]
    assert ["abcdef"[i] for i in found] == expected


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_heads_draft_what_packed_ones_do(params: dict[str, Any], one_folder: Path, tmp_path: Path) -> None:
    write_heads(tmp_path, 0.2, seed=4)
    config = {"method": "heads", "model": tmp_path, "adaptive": False, "num_speculative_paths": 2}
    prompts, found = prompts_of([8, 40, 12]), []
    for make in (device_engine, engine):
        llm = make(one_folder, speculative_config=config)
        assert texts(llm, prompts, **params) == texts(engine(one_folder), prompts, **params)
        found.append((llm.core.stats().drafted_tokens, llm.core.stats().accepted_tokens))
    assert found[0] == found[1]
    assert found[0][0]


def test_adapters_share_steps(one_folder: Path, tmp_path: Path) -> None:
    model = load_model(one_folder)
    add_lora(model, LoraConfig(rank=4), seed=1)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    save_adapter(model, tmp_path)
    prompts, names = as_prompts(prompts_of([5, 40, 9])), ["red", None, "red"]
    answers = [
        [
            r.outputs[0].token_ids
            for r in make(one_folder, adapters={"red": tmp_path}).generate(
                prompts, SamplingParams(**GREEDY), adapter=names
            )
        ]
        for make in (device_engine, engine)
    ]
    assert answers[0] == answers[1]


def test_new_weights(one_folder: Path) -> None:
    old, new = load_model(one_folder), init_model(load_model(one_folder).config, seed=6)
    prompts = prompts_of([20, 33])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, "PACKED", ())
        llm = LLM(old, tokenizer(), num_blocks=64)
    assert texts(llm, prompts, **GREEDY) == texts(LLM(old, tokenizer(), num_blocks=64), prompts, **GREEDY)
    assert llm.update_weights(new) == 1
    assert texts(llm, prompts, **GREEDY) == texts(LLM(new, tokenizer(), num_blocks=64), prompts, **GREEDY)


@pytest.mark.parametrize("make", [device_engine, engine], ids=["device", "packed"])
def test_weights_that_cannot_be_taken_over_change_nothing(make: Any, one_folder: Path) -> None:
    prompts, new = prompts_of([20, 33]), init_model(load_model(one_folder).config, seed=6)
    llm = make(one_folder, quantization="int8")
    before = texts(llm, prompts, **GREEDY)
    for wrong in (torch.nan, -torch.inf):
        with torch.no_grad():
            new.layers[-1].mlp.down_proj.weight[3, 5] = wrong
        with pytest.raises(ValueError, match=r"layers\.2\.mlp\.down_proj\.weight: expected finite numbers for int8"):
            llm.update_weights(new)
        assert texts(llm, prompts, **GREEDY) == before
    assert llm.core.stats().weight_version == 0


@pytest.mark.parametrize("kind", ["device", "packed"])
def test_an_update_that_is_cut_short(kind: str, one_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed with weights of two models; the next update makes them one."""
    make, holder = {"device": (device_engine, device._Holder), "packed": (engine, packed._Packer)}[kind]
    llm, prompts = make(one_folder), prompts_of([20, 33])
    before, new = texts(llm, prompts, **GREEDY), init_model(load_model(one_folder).config, seed=6)
    matrix, made = holder.matrix, []

    def failing(*arguments: Any) -> Any:
        made.append(arguments)
        if len(made) == 6:
            raise torch.OutOfMemoryError("no room")
        return matrix(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(holder, "matrix", failing)
        with pytest.raises(torch.OutOfMemoryError):
            llm.update_weights(new)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the last update of the weights was cut short"):
            llm.generate(as_prompts(prompts), SamplingParams(**GREEDY))
    llm.update_weights(load_model(one_folder))
    assert texts(llm, prompts, **GREEDY) == before


def test_an_engine_made_without_autograd_takes_new_weights(one_folder: Path) -> None:
    new = load_model(one_folder)
    for make in (device_engine, engine):
        with torch.inference_mode():
            llm = make(one_folder)
        llm.update_weights(new)
        assert texts(llm, prompts_of([9]), **GREEDY) == texts(engine(one_folder), prompts_of([9]), **GREEDY)


@pytest.mark.parametrize("options", [{}, {"quantization": "int4"}], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_log_probs_are_its_scores(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = load_model(write_model(tmp_path / family, family))
    llm = device_engine(model, tokenizer=tokenizer(), **options)
    ids = prompts_of([20, 33])
    batch = collate([Sample(np.array(i, np.int32), np.ones(len(i), np.float32)) for i in ids])
    found = llm.log_probs(model, batch)
    assert found.requires_grad
    assert torch.equal(found[batch.targets != -100], torch.tensor([x for s in llm.score(as_prompts(ids)) for x in s]))
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] += 0.5
        with pytest.raises(ValueError, match="log_probs: model: expected the weights of the engine"):
            llm.log_probs(model, batch)
        llm.update_weights(model)
        assert llm.log_probs(model, batch).shape == found.shape, name


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"quantization": "w8a8"}, "LLM: quantization: w8a8 is of the CPU alone; on cpu, expected None, int8, int4"),
        ({"kv_cache_dtype": "int8"}, "LLM: kv_cache_dtype: int8 is of the CPU alone; on cpu, expected auto"),
        ({"prefill_threads": 1}, "LLM: prefill_threads: 1 is of the CPU alone; on cpu, expected 0"),
        ({"num_blocks": None, "kv_cache_bytes": 9}, "LLM: kv_cache_bytes: expected at least 24576, one block, got 9"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_devices_do_not_have(options: dict[str, Any], expected: str, one_folder: Path) -> None:
    with pytest.raises(ValueError, match=expected):
        device_engine(one_folder, **options)


def test_a_type_without_kernels_is_told(
    one_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32 is the default."""
    for built, dtype, reason in (
        (False, torch.bfloat16, "bfloat16 on cpu: plain torch attends, slowly, since this build has no CUDA kernels"),
        (True, torch.float32, "float32 on cpu: plain torch attends, slowly, since the kernels are for bfloat16"),
        (True, torch.bfloat16, ""),
    ):
        monkeypatch.setattr(place, "HAS_CUDA", built)
        caplog.clear()
        device_engine(one_folder, dtype=dtype)
        assert (reason in caplog.text) if reason else not caplog.text


def test_an_unusable_device(one_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="LLM: device: expected cpu or cuda, got meta"):
        engine(one_folder, device="meta")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="LLM: device: torch finds no usable GPU, got cuda:1"):
            engine(one_folder, device="cuda:1")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(ValueError, match="LLM: device: torch finds 2 GPUs, numbered from 0, got cuda:2"):
            engine(one_folder, device="cuda:2")
