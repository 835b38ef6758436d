"""What a dry run tells against what the run then does, and the reckoned memory against what torch keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_resume import run_config
from resume_cases import train
from train_cases import collated, model_of

from fastsft.config import load_config
from fastsft.models.attend import VarlenAttend
from fastsft.train.metrics import read_metrics
from fastsft.train.optim import make_optimizer
from fastsft.train.plan import activations_per_token, make_plan, memory_of


def test_the_plan_is_what_the_run_does(texts: Path, tmp_path: Path) -> None:
    raw = run_config(texts, tmp_path / "run", steps=5)
    raw["lora"] = {"rank": 2}
    plan = make_plan(load_config(raw))
    assert not list((tmp_path / "run").glob("[!d.]*")), "nothing but data"
    trainer, _ = train(raw)
    steps = [m for m in read_metrics(tmp_path / "run" / "metrics.jsonl") if m["kind"] == "step"]
    (stage,) = plan.stages
    assert stage.exact
    assert stage.steps == len(steps) == 5
    assert stage.tokens == sum(m["tokens"] for m in steps)
    assert stage.trained_tokens == sum(m["trained_tokens"] for m in steps)
    assert stage.last_rate == pytest.approx(steps[-1]["lr"])
    about = json.loads((tmp_path / "run" / "about.json").read_text())
    done = sum(m["mfu"] * m["seconds"] for m in steps) * about["matmul_flops_per_second"]
    assert stage.flops == pytest.approx(done)
    assert plan.parameters == about["parameters"]
    assert plan.trained_parameters == about["trained_parameters"] < plan.parameters
    assert list(plan.first_batch) == trainer.stages[0].members(0)[0].tolist()


def test_a_curriculum_is_carried_on_from_its_first_round(texts: Path, tmp_path: Path) -> None:
    raw = run_config(texts, tmp_path / "run")
    raw["train"] = {"tokens_per_batch": 96}
    raw["stages"] = [
        {"name": "a", "max_steps": 40, "curriculum": "ucb", "curriculum_steps": 4},
        {"name": "b", "epochs": 2, "drop_easy": 0.5},
    ]
    first, second = make_plan(load_config(raw)).stages
    assert (first.exact, second.exact) == (False, False)
    assert first.steps == 40
    assert 0.6 * 40 * 96 < first.tokens <= 40 * 96
    assert second.samples == 2 * second.samples // 2 > 0


@pytest.mark.parametrize("keys", [{}, {"model_type": "qwen3", "num_hidden_layers": 5, "intermediate_size": 128}])
def test_activations_are_what_autograd_keeps(keys: dict[str, Any]) -> None:
    """Each storage once; of the whole decoder, whose parts outside of the layers are two of the hidden size."""
    model, batch = model_of(**keys), collated(40, 3)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model(batch.ids, batch.position_ids, VarlenAttend(batch.cu_seqlens))
    found = sum(t.untyped_storage().nbytes() for t in kept.values()) / 4 / batch.num_tokens
    expected = model.config.num_hidden_layers * activations_per_token(model.config) + 2 * model.config.hidden_size
    assert hidden.requires_grad
    assert found == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_is_what_the_optimizer_holds(dtype: str, kind: str) -> None:
    config = load_config({"model": {"dtype": dtype}, "optim": {"kind": kind}})
    model = model_of(dtype=getattr(torch, dtype))
    optimizer = make_optimizer(model, config.optim)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.collect()
    optimizer.step(1e-3, optimizer.grad_norm())
    held = sum(t.numel() * t.element_size() for n, t in optimizer.state().items() if t.ndim)
    memory = memory_of(config, model, share=1.0)
    assert memory.get("master weights", 0) + memory["optimizer moments"] == held


def test_what_is_unusual(texts: Path, tmp_path: Path) -> None:
    raw = run_config(texts, tmp_path / "run", steps=12)
    raw["schedule"] = {"warmup": 12}
    raw["data"]["eval_fraction"] = 0.0
    raw["train"]["save_every"] = 0
    told = "\n".join(make_plan(load_config(raw)).unusual)
    for expected in ("warmup takes all 12 steps", "nothing is held out", "the only checkpoint"):
        assert expected in told
    raw = run_config(texts, tmp_path / "plain", steps=12)
    assert make_plan(load_config(raw)).unusual == ()
