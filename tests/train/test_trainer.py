"""The update against torch and transformers: accumulation, packing, schedule, optimizer, loss curve."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from train_cases import model_of, random_samples, torch_adamw

from fastsft.config import ObjectiveOptions, OptimOptions, ScheduleOptions
from fastsft.data.batch import Sample, collate
from fastsft.data.store import SampleStore
from fastsft.models.attend import VarlenAttend
from fastsft.models.decoder import Decoder
from fastsft.train import schedule
from fastsft.train.evaluate import batch_loss, evaluate_loss
from fastsft.train.objective import Objective
from fastsft.train.optim import MasterAdamW
from fastsft.train.update import Update


def gradients(model: Decoder) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).norm() / b[n].norm()) for n in a)


# --- accumulation and packing ---------------------------------------------------------------------------------------


def update_gradients(
    samples: list[list[Sample]], dtype: torch.dtype, objective: ObjectiveOptions | None = None
) -> tuple[float, dict[str, torch.Tensor]]:
    """For these micro-batches: the loss, and the gradients that the optimizer would step with."""
    model = model_of(dtype=dtype)
    optimizer = MasterAdamW(model, OptimOptions())
    seen: dict[str, torch.Tensor] = {}

    def step(rate: float, norm: torch.Tensor) -> None:
        for one in optimizer.trained:
            assert one.gradient is not None
            wide = one.master.shape[0] == model.config.vocab_size  # summed in a float32 buffer from the start
            assert one.gradient.dtype == (dtype if len(samples) == 1 and not wide else torch.float32)
            seen[one.name] = one.gradient.float()
        expected = torch.stack([g.double().norm() for g in seen.values()]).norm()
        assert float(norm) == pytest.approx(float(expected), rel=1e-5)

    optimizer.step = step  # type: ignore[method-assign]
    update = Update(model, optimizer, Objective(objective or ObjectiveOptions()), seed=0)
    return update(0, [collate(s) for s in samples], 1.0).loss, seen


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_micro_batches_equal_one_batch(parts: int) -> None:
    samples = random_samples(15, 1)
    loss_one, one = update_gradients([samples], torch.float32)
    loss_many, many = update_gradients([samples[i::parts] for i in range(parts)], torch.float32)
    assert loss_many == pytest.approx(loss_one, rel=1e-6)
    assert difference(many, one) <= 1e-6


def test_low_precision_gradients_accumulate_in_float32() -> None:
    """64 equal micro-batches: their sum differs from one of them only by the rounding of a gradient, not of a sum."""
    samples = random_samples(3, 2)
    _, one = update_gradients([samples], torch.bfloat16)
    _, many = update_gradients([samples] * 64, torch.bfloat16)
    assert difference(many, one) <= 0.01


@torch.no_grad()
def test_packed_loss_equals_each_document_alone() -> None:
    model = model_of()
    samples = random_samples(9, 3)
    packed = float(batch_loss(model, collate(samples), normalizer=1.0))
    alone = sum(float(batch_loss(model, collate([s]), normalizer=1.0)) for s in samples)
    assert packed == pytest.approx(alone, rel=1e-6)
    weight = sum(float(s.weights[1:].sum()) for s in samples)
    result = evaluate_loss(model, SampleStore.from_samples(samples), capacity=40)
    assert result is not None
    assert result.loss == pytest.approx(alone / weight, rel=1e-6)
    assert result.tokens == sum(int((s.weights[1:] > 0).sum()) for s in samples)
    assert result.perplexity == pytest.approx(math.exp(result.loss))


@torch.no_grad()
def test_loss_is_the_weighted_mean_of_plain_cross_entropy() -> None:
    model = model_of()
    samples = random_samples(5, 4)
    total = 0.0
    for sample in samples:
        batch = collate([sample])
        logits = F.linear(
            model(batch.ids, batch.position_ids, VarlenAttend(batch.cu_seqlens)), model.lm_head_weight
        ).double()
        nll = F.cross_entropy(logits[:-1], torch.from_numpy(sample.ids[1:]).long(), reduction="none")
        total += float((nll * torch.from_numpy(sample.weights[1:]).double()).sum())
    assert float(batch_loss(model, collate(samples), normalizer=7.0)) == pytest.approx(total / 7, rel=1e-6)


def test_empty_store_has_no_loss() -> None:
    assert evaluate_loss(model_of(), SampleStore.from_samples([]), capacity=10) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_checkpointing_changes_no_bit(dtype: torch.dtype) -> None:
    found = []
    for recompute in (False, True):
        model = model_of(dtype=dtype)
        model.activation_checkpointing = recompute
        batch_loss(model, collate(random_samples(4, 5)), normalizer=3.0).backward()
        found.append(gradients(model))
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


# --- schedule -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 0.1, 4, 200])
@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_schedule_closed_form(kind: Any, warmup: float) -> None:
    options = ScheduleOptions(kind=kind, warmup=warmup, final=0.1)
    total = 50
    warm = {0: 0, 0.1: 5, 4: 4, 200: 50}[warmup]
    assert schedule.warmup_steps(options, total) == warm
    for step in range(total):
        if step < warm:
            expected = (step + 1) / warm
        elif kind == "constant":
            expected = 1.0
        else:
            x = (step - warm + 1) / (total - warm)
            expected = 1 - 0.9 * x if kind == "linear" else 0.1 + 0.45 * (1 + math.cos(math.pi * x))
        assert schedule.factor(options, step, total) == pytest.approx(expected, abs=1e-12), step
    if warm < total and kind != "constant":
        assert schedule.factor(options, total - 1, total) == pytest.approx(0.1)


def test_schedule_of_one_step() -> None:
    assert schedule.factor(ScheduleOptions(), 0, 1) == 1.0


# --- optimizer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_optimizer_equals_torch(tied: bool) -> None:
    options = OptimOptions(lr=1e-2, weight_decay=0.3, clip_norm=0.5)
    ours, theirs = model_of(tie_word_embeddings=tied), model_of(tie_word_embeddings=tied)
    mine, other = MasterAdamW(ours, options), torch_adamw(theirs, options)
    clipped = False
    for step in range(6):
        batch, rate = collate(random_samples(6, step)), 1e-2 / (step + 1)
        for model in (ours, theirs):
            batch_loss(model, batch, normalizer=20.0).backward()
        mine.collect()
        norm = mine.grad_norm()
        clipped |= bool(norm > 0.5)
        mine.step(rate, norm)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for group in other.param_groups:
            group["lr"] = rate
        other.step()
        other.zero_grad()
    assert clipped
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6, msg=name)
        assert a.grad is None


def test_bfloat16_keeps_float32_masters() -> None:
    """Steps far below a bfloat16 unit in the last place add up in the masters, exactly as in a float32 optimizer."""
    options = OptimOptions(lr=1e-5, clip_norm=0)
    model = model_of(dtype=torch.bfloat16)
    copies = {n: torch.nn.Parameter(p.detach().float()) for n, p in model.named_parameters()}
    mine = MasterAdamW(model, options)
    other = torch.optim.AdamW(copies.values(), lr=1e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    for step in range(5):
        batch_loss(model, collate(random_samples(4, step)), normalizer=9.0).backward()
        for name, grad in gradients(model).items():
            copies[name].grad = grad.float()
        mine.collect()
        mine.step(1e-5, mine.grad_norm())
        other.step()
    moved = 0
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert (mine.masters[name] - copies[name]).abs().max() <= 1e-7, name
        assert torch.equal(parameter, mine.masters[name].bfloat16()), name
        assert not torch.equal(mine.masters[name], start[name].float()), name
        moved += int((parameter != start[name]).sum())
    assert 0 < moved < sum(p.numel() for p in model.parameters()) / 2, "most steps are below bfloat16's resolution"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_state_round_trip_continues_bitwise(dtype: torch.dtype) -> None:
    def advance(model: Decoder, optimizer: MasterAdamW, steps: range) -> None:
        for step in steps:
            batch_loss(model, collate(random_samples(4, step)), normalizer=9.0).backward()
            optimizer.collect()
            optimizer.step(1e-3, optimizer.grad_norm())

    whole = model_of(dtype=dtype)
    optimizer = MasterAdamW(whole, OptimOptions(weight_decay=0.1))
    advance(whole, optimizer, range(3))
    state = {k: v.clone() for k, v in optimizer.state().items()}
    resumed = model_of(dtype=dtype)
    resumed.load_state_dict(whole.state_dict())
    other = MasterAdamW(resumed, OptimOptions(weight_decay=0.1))
    other.load_state(state)
    advance(whole, optimizer, range(3, 6))
    advance(resumed, other, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
