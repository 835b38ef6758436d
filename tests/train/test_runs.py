"""Whole runs: every sample once per epoch, overfitting, and the loss curve of a plain transformers loop."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kill_resume import run_config, write_texts
from train_cases import MODEL, model_of, random_samples, torch_adamw

import fastsft
from fastsft.config import ConfigError, load_config
from fastsft.data.loader import PackedLoader
from fastsft.data.prepare import Prepared
from fastsft.data.store import SampleStore
from fastsft.models.tokenizer import Tokenizer
from fastsft.models.weights import save_model
from fastsft.train import start
from fastsft.train.metrics import read_metrics
from fastsft.train.trainer import Trainer


def byte_tokenizer() -> Tokenizer:
    return Tokenizer.train(["a b"], 262)


def test_every_epoch_trains_every_sample_once(tmp_path: Path) -> None:
    """Also where epochs differ in their number of batches, and the last step of each is a short one."""
    config = load_config(
        {
            "output": str(tmp_path / "run"),
            "model": {"init": {k: v for k, v in MODEL.items() if k != "vocab_size"}, "dtype": "float32"},
            "data": {"train": ["unused"], "max_length": 24},
            "train": {"tokens_per_batch": 120, "accumulation": 3, "epochs": 8, "save_every": 0, "eval_every": 0},
        }
    )
    prepared = Prepared(
        SampleStore.from_samples(random_samples(120, 8)),
        SampleStore.from_samples([]),
        byte_tokenizer(),
        {"key": "fixed"},
    )
    trainer = Trainer(config, prepared=prepared, progress=False)
    (stage,) = trainer.stages
    counts = [stage.loader.num_batches(epoch) for epoch in range(8)]
    assert len(set(counts)) > 1, "the case must have epochs of different lengths"
    seen: list[list[str]] = []
    for step in range(trainer.total_steps):
        batches = stage.batches(step)
        assert 1 <= len(batches) <= 3
        seen.append([s for b in batches for s in b.sources])
    assert trainer.total_steps == sum(math.ceil(c / 3) for c in counts)
    position = 0
    for count in counts:
        steps = seen[position : position + math.ceil(count / 3)]
        position += len(steps)
        assert sorted(s for step in steps for s in step) == sorted(f"row:{i + 1}" for i in range(120))


def test_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    save_model(model_of(), tmp_path / "start")
    (tmp_path / "other").mkdir()
    Tokenizer.train(["some words"], 300).save(tmp_path / "other")
    config = load_config(
        {
            "output": str(tmp_path / "run"),
            "model": {"path": str(tmp_path / "start")},
            "tokenizer": {"path": str(tmp_path / "other")},
            "data": {"train": [str(write_texts(tmp_path / "t.jsonl", 8))], "max_length": 256},
        }
    )
    with pytest.raises(
        ConfigError, match=r"tokenizer: expected ids below the model's vocab_size 97, got \d+ in the data"
    ):
        Trainer(config)


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ({"num_hiden_layers": 7}, r"unknown key 'model\.init\.num_hiden_layers'; did you mean 'num_hidden_layers'"),
        ({"rope_teta": 1e6}, r"unknown key 'model\.init\.rope_teta'; did you mean 'rope_theta'"),
        ({"head_dim": 16}, r"model: head_dim: expected one of 32, 64, 80, 96, 128, 256, got 16"),
        ({"max_position_embeddings": 64}, r"data\.max_length: expected at most .* = 64, got 96"),
        ({"model_type": "gpt2"}, r"model\.init: model_type: expected one of llama"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_before_the_data_are_read(
    init: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = run_config(write_texts(tmp_path / "t.jsonl", 8), tmp_path / "run")
    config["model"]["init"] |= init
    with pytest.raises(ValueError, match=message):
        Trainer(load_config(config))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        (None, 128),
        ({"rope_type": "linear", "factor": 2.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),  # extended already
    ],
)
def test_positions_of_an_extended_model(scaling: dict[str, Any] | None, longest: int, tmp_path: Path) -> None:
    config = run_config(tmp_path / "t.jsonl", tmp_path / "run")
    config["model"]["init"] |= {"rope_scaling": scaling}
    config["train"]["tokens_per_batch"] = 1024
    for length in (longest, longest + 1):
        config["data"]["max_length"] = length
        resolved = load_config(config)
        if length == longest:
            start.check_fits(resolved, start.architecture(resolved))
        else:
            with pytest.raises(ConfigError, match=f"max_position_embeddings = {longest}, got {length}"):
                start.check_fits(resolved, start.architecture(resolved))


def test_a_missing_model_is_refused_before_the_data_are_read(tmp_path: Path) -> None:
    config = run_config(write_texts(tmp_path / "t.jsonl", 8), tmp_path / "run")
    for model, message in (({"path": str(tmp_path / "no")}, "no/config.json: cannot read"), ({}, "give model.path")):
        config |= {"model": model, "tokenizer": {}}
        with pytest.raises(ValueError, match=message):
            Trainer(load_config(config))


def test_a_config_object_is_validated(tmp_path: Path) -> None:
    config = load_config(run_config(write_texts(tmp_path / "t.jsonl", 8), tmp_path / "run"))
    wrong = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation=0))
    for call in (fastsft.train, Trainer):
        with pytest.raises(ConfigError, match=r"train\.accumulation: expected at least 1, got 0"):
            call(wrong)


def test_overfits_eight_samples(tmp_path: Path) -> None:
    config = run_config(write_texts(tmp_path / "t.jsonl", 8), tmp_path / "run", steps=200, accumulation=1, save_every=0)
    config["train"]["epochs"] = 200
    config["data"]["eval_fraction"] = 0.0
    config["optim"] = {"lr": 1e-2}
    config["train"]["tokens_per_batch"] = 512
    result = Trainer(load_config(config), progress=False).run()
    assert result.train_loss < 0.05
    assert result.eval_before is None


def test_loss_curve_equals_a_plain_loop(tmp_path: Path) -> None:
    """20 steps against transformers' model, padded batches and torch's AdamW."""
    transformers = pytest.importorskip("transformers")
    samples = random_samples(30, 6)
    store = SampleStore.from_samples(samples)
    save_model(model_of(seed=3), tmp_path / "start")
    config = load_config(
        {
            "output": str(tmp_path / "run"),
            "seed": 5,
            "model": {"path": str(tmp_path / "start"), "dtype": "float32"},
            "data": {"train": ["unused"], "max_length": 24},
            "optim": {"lr": 3e-3, "weight_decay": 0.1},
            "schedule": {"warmup": 4, "final": 0.2},
            "train": {"tokens_per_batch": 48, "accumulation": 3, "epochs": 9, "max_steps": 20, "save_every": 0},
        }
    )
    prepared = Prepared(store, SampleStore.from_samples([]), byte_tokenizer(), {"key": "fixed"})
    Trainer(config, prepared=prepared, progress=False).run()
    ours = [m for m in read_metrics(tmp_path / "run" / "metrics.jsonl") if m["kind"] == "step"]

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "start", attn_implementation="eager")
    optimizer = torch_adamw(model, config.optim)
    loader = PackedLoader(store, capacity=48, seed=5)
    by_source = {s.source: s for s in samples}
    order = [(epoch, i) for epoch in range(9) for i in range(math.ceil(loader.num_batches(epoch) / 3))]
    for step, (epoch, first) in enumerate(order[:20]):
        members = [
            by_source[s]
            for i in range(first * 3, min(first * 3 + 3, loader.num_batches(epoch)))
            for s in loader.batch(epoch, i).sources
        ]
        width = max(len(s.ids) for s in members)
        ids = torch.zeros(len(members), width, dtype=torch.long)
        weights, mask = torch.zeros(len(members), width), torch.zeros(len(members), width, dtype=torch.long)
        for row, s in enumerate(members):
            ids[row, : len(s.ids)] = torch.from_numpy(s.ids)
            weights[row, : len(s.ids)] = torch.from_numpy(s.weights)
            mask[row, : len(s.ids)] = 1
        logits = model(ids, attention_mask=mask).logits[:, :-1]
        nll = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (nll * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        x = (step - 3) / 16
        rate = 3e-3 * ((step + 1) / 4 if step < 4 else 0.2 + 0.4 * (1 + math.cos(math.pi * x)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        assert ours[step]["lr"] == pytest.approx(rate, rel=1e-9)
        assert ours[step]["loss"] == pytest.approx(float(loss.detach()), abs=1e-4), step
        assert ours[step]["grad_norm"] == pytest.approx(float(norm), rel=1e-3)
        assert ours[step]["tokens"] == sum(len(s.ids) for s in members)
