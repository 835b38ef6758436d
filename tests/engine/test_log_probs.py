"""LLM.log_probs: the values are those of rollouts, to the bit, and the gradients those of the log-probabilities."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import SHAPE, as_prompts, assert_nothing_held, prompts_of, tokenizer, write_model

from fastsft import ops
from fastsft.data.batch import Sample, VarlenBatch, collate
from fastsft.engine.llm import LLM
from fastsft.engine.request import PromptError, RequestOutput, SamplingParams
from fastsft.models.attend import VarlenAttend
from fastsft.models.decoder import Decoder
from fastsft.models.lora import LoraConfig, add_lora
from fastsft.models.stacked import _equal
from fastsft.models.weights import init_model, load_model

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "qwen2", "qwen2")


def engine_of(model: Decoder, **options: Any) -> LLM:
    return LLM(model, tokenizer(), **({"num_blocks": 64} | options))


def rollouts(llm: LLM, count: int = 6, **params: Any) -> list[RequestOutput]:
    """Of prompts that begin alike, and of one token."""
    (trunk,) = prompts_of([40], seed=2)
    prompts = [trunk[: 20 + 4 * i] for i in range(count - 1)] + [[9]]
    common = {"temperature": 1.0, "max_tokens": 40, "ignore_eos": True, "logprobs": 0, "n": 2} | params
    return llm.generate(as_prompts(prompts), [SamplingParams(seed=10 * i, **common) for i in range(count)])


def packed(
    outputs: list[RequestOutput], reward: Callable[[int], float] = lambda k: 1.0
) -> tuple[VarlenBatch, torch.Tensor]:
    """Weights are 0 on prompts and the reward on the k-th answer; and what was reported of the targets."""
    samples, reported = [], []
    for output in outputs:
        for one in output.outputs:
            assert one.logprobs is not None
            ids = [*output.prompt_token_ids, *one.token_ids]
            weights = np.zeros(len(ids), np.float32)
            weights[len(output.prompt_token_ids) :] = reward(len(samples))
            samples.append(Sample(np.array(ids, np.int32), weights))
            reported += [0.0] * (len(output.prompt_token_ids) - 1)
            reported += [shown[i] for i, shown in zip(one.token_ids, one.logprobs, strict=True)] + [0.0]
    return collate(samples), torch.tensor(reported)


def gradients(model: Decoder, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def log_probs_in_training(model: Decoder, batch: VarlenBatch) -> torch.Tensor:
    hidden = model(batch.ids, batch.position_ids, VarlenAttend(batch.cu_seqlens))
    return ops.linear_logprobs(hidden, model.lm_head_weight, batch.targets)  # type: ignore[return-value]


ENGINES: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks": {"max_batched_tokens": 13, "max_num_seqs": 5},
    "preemption": {"num_blocks": 10, "max_batched_tokens": 40},
    "drafts": {"speculative_config": {"method": "suffix", "adaptive": False, "min_match": 1}},
    "rejection": {"speculative_config": {"method": "draft_model", "acceptance": "rejection", "adaptive": False}},
    "int8": {"quantization": "int8", "kv_cache_dtype": "int8"},
}
DRAWS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ratio_to_a_rollout_is_one(dtype: torch.dtype, name: str, folder: Path) -> None:
    model = load_model(folder, dtype=dtype)
    options = copy.deepcopy(ENGINES[name])
    if name == "rejection":
        options["speculative_config"]["model"] = folder
    llm = engine_of(model, **options)
    for draw in DRAWS:
        batch, reported = packed(rollouts(llm, **draw))
        found = llm.log_probs(model, batch)
        assert found.dtype == torch.float32
        assert found.requires_grad
        assert torch.equal(found, reported)
        assert torch.equal((found - reported).exp(), torch.ones(len(reported)))
        trained = log_probs_in_training(model, batch)
        assert not torch.equal(trained, reported)  # which is why
        assert (trained - reported).abs().max() < {"int8": 1.0}.get(name, 1e-4 if dtype == torch.float32 else 0.2)
    stats = llm.core.stats()
    assert stats.found_tokens > 100
    assert (stats.preemptions > 0) == (name == "preemption")
    assert (stats.accepted_tokens > 0) == (name in ("drafts", "rejection"))
    assert_nothing_held(llm)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_as_good_as_those_of_transformers(dtype: torch.dtype, family: str, tmp_path: Path) -> None:
    """The rule of docs/numerics.md: at most twice the error of eager transformers in the same type."""
    import transformers

    folder = write_model(tmp_path / family, family)
    model = load_model(folder, dtype=dtype)
    llm = engine_of(model)
    batch, _ = packed(rollouts(llm), reward=lambda k: (-0.5) ** (k % 4))
    upstream = torch.randn(batch.num_tokens, generator=torch.Generator().manual_seed(3))
    ours = gradients(model, (llm.log_probs(model, batch) * upstream).sum())

    def theirs(precision: torch.dtype) -> dict[str, torch.Tensor]:
        whole = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=precision)
        for begin, end in zip(batch.cu_seqlens.tolist(), batch.cu_seqlens.tolist()[1:], strict=False):
            logits = whole(batch.ids[None, begin:end], use_cache=False).logits[0]
            kept = batch.targets[begin:end] != -100
            own = batch.targets[begin:end][kept][:, None]
            found = torch.log_softmax(logits[kept].to(max(precision, torch.float32, key=lambda t: t.itemsize)), -1)
            (found.gather(1, own)[:, 0] * upstream[begin:end][kept]).sum().backward()
        return {n.removeprefix("model."): p.grad for n, p in whole.named_parameters()}

    same, exact = theirs(dtype), theirs(torch.float64)
    assert ours.keys() == exact.keys()
    for key, want in exact.items():
        unit = torch.finfo(dtype).eps * want.abs().max()
        mine, allowed = (ours[key].double() - want).abs(), (same[key].double() - want).abs()
        assert mine.max() <= 2 * allowed.max() + 4 * unit, key
        assert mine.norm() <= 2 * allowed.norm() + 4 * unit * want.numel() ** 0.5, key


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_policy_gradient_loop(dtype: torch.dtype, adapted: bool, folder: Path) -> None:
    """On-policy, the clipped ratio's gradient is REINFORCE's; after a step and new weights in the engine, again."""
    model = load_model(folder, dtype=dtype)
    if adapted:
        add_lora(model, LoraConfig(rank=4), seed=1)
    trained = [p for p in model.parameters() if p.requires_grad]
    llm = engine_of(model, speculative_config={"method": "ngram"})
    for step in range(3):
        batch, reported = packed(rollouts(llm), reward=lambda k: 1.0 if k % 3 == 0 else -0.5)
        found, advantages = llm.log_probs(model, batch), batch.weights
        ratio = (found - reported).exp()
        assert torch.equal(ratio, torch.ones_like(ratio))
        clipped = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        got = gradients(model, -clipped.sum() / batch.num_tokens)
        want = gradients(model, -(log_probs_in_training(model, batch) * advantages).sum() / batch.num_tokens)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], grad) for key, grad in want.items())
        with torch.no_grad():
            torch._fused_adamw_(  # as fastsft's AdamW does; leaves no trace in the version counters
                trained, [got[n] for n, p in model.named_parameters() if p.requires_grad],
                [torch.zeros_like(p) for p in trained], [torch.zeros_like(p) for p in trained], [],
                [torch.ones(()) for _ in trained], lr=0.01, beta1=0.9, beta2=0.99, weight_decay=0.0, eps=1e-8,
                amsgrad=False, maximize=False,
            )  # fmt: skip
        with pytest.raises(ValueError, match="log_probs: model: expected the weights of the engine"):
            llm.log_probs(model, batch)
        assert llm.update_weights(model) == step + 1
        later = llm.log_probs(model, batch)
        assert not torch.equal(later, reported)
        assert torch.equal(later, engine_of(model).log_probs(model, batch))


def change(model: Decoder, name: str) -> None:
    with torch.no_grad():
        parameter = dict(model.named_parameters())[name].data
        parameter.view(-1)[-1] += 0.5


@pytest.mark.parametrize("options", [{}, {"quantization": "int8"}, {"quantization": "int4"}], ids=str)
def test_any_other_weight_is_an_error(options: dict[str, Any], folder: Path) -> None:
    model = load_model(folder)
    llm = engine_of(model, **options)
    batch, reported = packed(rollouts(llm, count=2))
    for name in [name for name, _ in model.named_parameters()]:
        change(model, name)
        with pytest.raises(ValueError, match="log_probs: model: expected the weights of the engine"):
            llm.log_probs(model, batch)
        llm.update_weights(model)
        llm.log_probs(model, batch)
    llm.update_weights(load_model(folder))
    assert torch.equal(llm.log_probs(load_model(folder), batch), reported)  # another object, the same weights
    small = init_model(SHAPE | {"model_type": "qwen2", "num_hidden_layers": 2}, seed=5)
    with pytest.raises(ValueError, match="log_probs: model: expected num_hidden_layers=3, got 2"):
        llm.log_probs(small, batch)


def test_weights_are_compared_bit_by_bit_wherever_they_lie(folder: Path) -> None:
    model = load_model(folder)
    llm, batch = engine_of(model), packed(rollouts(engine_of(model), 2))[0]
    embedding = model.embed_tokens.weight
    embedding.data = torch.cat([torch.zeros(1), embedding.detach().flatten()])[1:].view_as(embedding)
    assert llm.log_probs(model, batch).any()
    for one, other, same in ((0.0, -0.0, False), (torch.nan, torch.nan, True)):
        assert _equal(torch.tensor([one] * 3), torch.tensor([other] * 3)) is same


def test_a_tied_head_that_was_quantised_before_the_embedding_was_rounded(tmp_path: Path) -> None:
    model = load_model(write_model(tmp_path / "qwen3", "qwen3"), dtype=torch.float32)
    llm = engine_of(model, quantization="int8")
    batch, _ = packed(rollouts(llm, count=2))
    weight = model.embed_tokens.weight.data
    before = weight.bfloat16()
    weight[3, weight[3].abs().argmax()] *= 1 + 2**-20
    assert torch.equal(weight.bfloat16(), before)
    with pytest.raises(ValueError, match="log_probs: model: expected the weights of the engine"):
        llm.log_probs(model, batch)


def test_documents_without_targets_and_without_tokens(folder: Path) -> None:
    model = load_model(folder)
    llm = engine_of(model)
    batch, reported = packed(rollouts(llm, count=2), reward=lambda k: float(k != 1))
    first, second = batch.cu_seqlens[1:3].tolist()
    empty = dataclasses.replace(batch, cu_seqlens=torch.cat([batch.cu_seqlens[:1], batch.cu_seqlens]))
    for one in (batch, empty):
        found = llm.log_probs(model, one)
        assert not found[first:second].any()
        assert torch.equal(found[:first], reported[:first])
        assert torch.equal(found[second:], reported[second:])
    nothing = collate([])
    assert llm.log_probs(model, nothing).shape == (0,)
    untrained = dataclasses.replace(batch, targets=torch.full_like(batch.targets, -100))
    found = llm.log_probs(model, untrained)
    assert not found.any()
    assert not any(grad.any() for grad in gradients(model, found.sum()).values())


def test_without_autograd_the_model_is_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(folder)
    llm = engine_of(model)
    batch, reported = packed(rollouts(llm, count=2))
    monkeypatch.setattr(Decoder, "forward", None)
    with torch.no_grad():
        found = llm.log_probs(model, batch)
    assert torch.equal(found, reported)
    assert not found.requires_grad


def test_what_is_refused(folder: Path) -> None:
    model = load_model(folder)
    llm = engine_of(model)
    batch, _ = packed(rollouts(llm, count=2))
    targets, positions = batch.targets.clone(), batch.position_ids.clone()
    at = int((targets != -100).nonzero()[3])
    right, targets[at] = int(targets[at]), 1
    positions[5] = 7
    across, end = batch.targets.clone(), int(batch.cu_seqlens[1])
    across[end - 1] = batch.ids[end]
    for field, value, expected in (
        ("targets", targets, rf"log_probs: batch: targets\[{at}\]: expected {right}, got 1"),
        ("targets", batch.ids, rf"log_probs: batch: targets\[0\]: expected {int(batch.ids[1])}, got"),
        ("targets", across, rf"log_probs: batch: targets\[{end - 1}\]: expected -100, got"),
        ("position_ids", positions, r"log_probs: batch: position_ids\[5\]: expected 5, got 7"),
        ("cu_seqlens", batch.cu_seqlens[:-1], r"log_probs: batch: cu_seqlens: expected 0 to \d+, not falling, got \["),
    ):
        with pytest.raises(ValueError, match=expected):
            llm.log_probs(model, dataclasses.replace(batch, **{field: value}))
    long = np.array(prompts_of([SHAPE["max_position_embeddings"] + 1])[0], np.int32)
    with pytest.raises(PromptError, match="context"):
        llm.log_probs(model, collate([Sample(long, np.ones(len(long), np.float32))]))
    assert_nothing_held(llm)
