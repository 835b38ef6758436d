"""Draft heads: labels against a loop, gradients against torch, a model that does not notice, a resume to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Ranks, train_rank
from resume_cases import small, train
from torch.nn import functional as F
from train_cases import model_of, random_samples

from fastsft.config import Config, ConfigError, DraftOptions, ObjectiveOptions, OptimOptions, load_config
from fastsft.data.batch import Sample, VarlenBatch, collate
from fastsft.models.attend import VarlenAttend
from fastsft.models.heads import DraftHeads, load_heads, save_heads
from fastsft.train.draft import DraftTraining, later_targets
from fastsft.train.metrics import read_metrics
from fastsft.train.objective import Objective
from fastsft.train.optim import MasterAdamW
from fastsft.train.update import Update

HEADS = 3


def samples() -> list[Sample]:
    """With documents shorter than the heads reach, and a negative weight."""
    some = random_samples(5, 3)
    short = [Sample(np.arange(n, dtype=np.int32), np.ones(n, np.float32)) for n in (1, 2, 3, 4)]
    short[3].weights[2] = -1
    return [short[0], *some[:2], short[1], short[2], *some[2:], short[3]]


@pytest.mark.parametrize("ahead", [1, 2, 3, 30])
def test_labels_are_those_of_a_loop(ahead: int) -> None:
    expected: list[tuple[int, float]] = []
    for sample in samples():
        for t in range(len(sample.ids)):
            place = t + 1 + ahead
            weight = float(sample.weights[place]) if place < len(sample.ids) else 0.0
            expected.append((int(sample.ids[place]), weight) if weight > 0 else (-100, 0.0))
    targets, weights = later_targets(collate(samples()), ahead)
    assert list(zip(targets.tolist(), weights.tolist(), strict=True)) == expected
    assert any(w for _, w in expected) == (ahead < 30)


def a_config(**draft: Any) -> Config:
    return load_config({"draft": {"heads": HEADS, **draft}, "optim": {"clip_norm": 0.0}})


def step_of(batches: list[VarlenBatch], seed: int = 0) -> tuple[DraftTraining, dict[str, torch.Tensor], Any]:
    """The heads after a step from random ones, the gradients that it took, and what it reported."""
    model = model_of()
    draft = DraftTraining(model, a_config())
    generator = torch.Generator().manual_seed(seed)
    for p in draft.heads.parameters():
        p.data.normal_(0, 0.1, generator=generator)
    gradients: dict[str, torch.Tensor] = {}
    original = draft.optimizer.step

    def step(rate: float, norm: torch.Tensor) -> None:
        gradients.update({n: p.grad.clone() for n, p in draft.heads.named_parameters() if p.grad is not None})
        original(rate, norm)

    draft.optimizer.step = step  # type: ignore[method-assign]
    optimizer = MasterAdamW(model, OptimOptions())
    update = Update(model, optimizer, Objective(ObjectiveOptions()), seed=0, draft=draft)
    return draft, gradients, update(0, batches, 0.0, 1e-2)


def test_losses_and_gradients_are_those_of_torch() -> None:
    batch = collate(samples())
    model = model_of()
    with torch.no_grad():
        hidden = model(batch.ids, batch.position_ids, VarlenAttend(batch.cu_seqlens)).double()
    _, gradients, result = step_of([batch])
    heads = DraftHeads(HEADS, hidden.shape[1]).double()
    generator = torch.Generator().manual_seed(0)
    for p in heads.parameters():
        p.data.copy_(torch.empty(p.shape).normal_(0, 0.1, generator=generator))
    for i in range(HEADS):
        targets, weights = later_targets(batch, i + 1)
        linear = heads.heads[i]
        x = hidden + F.silu(hidden @ linear.weight.T + linear.bias)
        each = F.cross_entropy(x @ model.lm_head_weight.double().T, targets, reduction="none", ignore_index=-100)
        loss = (each * weights).sum() / weights.sum()
        loss.backward()
        assert abs(float(loss.detach()) - result.draft_losses[i]) <= 1e-5
    for name, p in heads.named_parameters():
        assert p.grad is not None
        assert (gradients[name] - p.grad).norm() <= 1e-4 * p.grad.norm(), name


def test_micro_batches_give_what_one_batch_gives() -> None:
    whole, one, _ = step_of([collate(samples())])
    parts, many, _ = step_of([collate(samples()[:4]), collate(samples()[4:])])
    assert one.keys() == dict(whole.heads.named_parameters()).keys()
    for name in one:
        assert (one[name] - many[name]).norm() <= 1e-5 * one[name].norm()
    assert len(parts.heads) == HEADS


def bits(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_ends_in_the_same_bits(dtype: str, texts: Path, tmp_path: Path) -> None:
    def config(output: Path, **extra: Any) -> dict[str, Any]:
        base = small(texts, output)
        return base | {"model": base["model"] | {"dtype": dtype}} | extra

    heads = {"draft": {"heads": HEADS, "lr": 1e-2}}
    train(config(tmp_path / "whole", **heads))
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for gone in ("heads", "model", "checkpoints/step-00000003", "checkpoints/step-00000004"):
        shutil.rmtree(tmp_path / "resumed" / gone)
    _, result = train(config(tmp_path / "resumed", **heads))
    assert result.resumed_from == 2
    assert bits(tmp_path / "resumed" / "heads") == bits(tmp_path / "whole" / "heads") != {}
    train(config(tmp_path / "without"))
    for other in ("whole", "resumed"):
        assert bits(tmp_path / other / "model") == bits(tmp_path / "without" / "model") != {}


def test_a_frozen_model_stays_and_its_heads_learn(texts: Path, tmp_path: Path) -> None:
    train(small(texts, tmp_path / "model"))
    config = small(texts, tmp_path / "heads", max_steps=20, save_every=0)
    config |= {
        "model": {"path": str(tmp_path / "model" / "model"), "dtype": "float32"},
        "draft": {"heads": HEADS, "lr": 1e-2, "frozen": True},
    }
    del config["tokenizer"]
    train(config)
    assert bits(tmp_path / "heads" / "model") == bits(tmp_path / "model" / "model") != {}
    lines = [json.loads(line) for line in (tmp_path / "heads" / "metrics.jsonl").read_text().splitlines()]
    losses = np.array([line["draft_losses"] for line in lines if line["kind"] == "step"])
    assert losses.shape == (20, HEADS)
    assert (losses[-4:].mean(0) < losses[:2].mean(0) - 0.05).all()
    heads = load_heads(tmp_path / "heads" / "heads", hidden_size=32, vocab_size=300)
    assert len(heads) == HEADS


def test_a_head_begins_as_the_models_own() -> None:
    hidden = torch.randn(5, 48)
    assert torch.equal(DraftHeads(2, 48)(hidden, 1), hidden)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"heads": 0}, "heads"), ({"hidden_size": 40}, "hidden_size"), ({"vocab_size": 7}, "vocab_size"), ({}, "")],
)
def test_a_folder_that_does_not_fit(change: dict[str, int], named: str, tmp_path: Path) -> None:
    save_heads(DraftHeads(2, 48), tmp_path, vocab_size=97)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    if not change:
        (tmp_path / "heads.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match=f"config.json: {named}:" if named else "expected a folder with"):
        load_heads(tmp_path, hidden_size=48, vocab_size=97)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"draft": {"heads": -1}}, "draft.heads"),
        ({"draft": {"lr": 0.0}}, "draft.lr"),
        ({"draft": {"frozen": True}}, "draft.frozen"),
        ({"draft": {"heads": 1, "frozen": True}, "lora": {"rank": 2}}, "draft.frozen"),
        ({"draft": {"heads": 1}, "train": {"parallel": "fsdp"}}, "draft.heads"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(settings)
    assert DraftOptions().heads == 0


def test_two_processes_train_the_heads_of_one(texts: Path, tmp_path: Path) -> None:
    def config(output: Path) -> dict[str, Any]:
        return small(texts, output, accumulation=3) | {"draft": {"heads": HEADS, "lr": 1e-2}}

    train(config(tmp_path / "one"))
    ranks = Ranks(2, tmp_path / "log", train_rank, config(tmp_path / "two"))
    assert ranks.join() == [0, 0], ranks.text(0)
    one, two = (load_heads(tmp_path / n / "heads", hidden_size=32, vocab_size=300).state_dict() for n in ("one", "two"))
    for name in one:
        assert (one[name] - two[name]).norm() <= 1e-3 * one[name].norm(), name
    first, second = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    losses = [[row["draft_losses"] for row in rows if row["kind"] == "step"] for rows in (first, second)]
    assert np.allclose(*losses, rtol=1e-5)
