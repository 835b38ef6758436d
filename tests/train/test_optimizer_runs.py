"""Runs with each optimizer and with averaged weights: resumed to the same bytes, and what they export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from kill_resume import run_config, weights
from resume_cases import train
from test_resume import stop_at
from train_cases import NEEDS_MUON


def config_of(texts: Path, output: Path, dtype: str, **optim: Any) -> dict[str, Any]:
    config = run_config(texts, output, dtype=dtype, steps=6)
    return {**config, "optim": {**config["optim"], **optim}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "optim",
    [
        pytest.param({"kind": "muon"}, marks=NEEDS_MUON),
        {"ema": 0.5},
        pytest.param({"kind": "muon", "ema": 0.9}, marks=NEEDS_MUON),
    ],
)
def test_resumed_to_the_same_bytes(optim: dict[str, Any], dtype: str, texts: Path, tmp_path: Path) -> None:
    _, whole = train(config_of(texts, tmp_path / "whole", dtype, **optim))
    stop_at(config_of(texts, tmp_path / "run", dtype, **optim), 4)
    _, result = train(config_of(texts, tmp_path / "run", dtype, **optim))
    assert result.resumed_from == 4
    assert weights(result.model_path) == weights(whole.model_path)
    assert result.eval_after == whole.eval_after
    _, plain = train(config_of(texts, tmp_path / "plain", dtype))
    assert weights(plain.model_path) != weights(whole.model_path)


def test_the_average_is_exported_and_the_run_goes_on_without_it(texts: Path, tmp_path: Path) -> None:
    _, averaged = train(config_of(texts, tmp_path / "run", "float32", ema=0.7))
    _, plain = train(config_of(texts, tmp_path / "plain", "float32"))
    last = "checkpoints/step-00000006"
    assert weights(tmp_path / "run" / last / "model") == weights(plain.model_path), "training itself is the same"
    tensors = safetensors.torch.load_file(tmp_path / "run" / last / "optimizer.safetensors")
    exported = safetensors.torch.load_file(averaged.model_path / "model.safetensors")
    for name, value in exported.items():
        assert torch.equal(value, tensors[f"ema/{name.removeprefix('model.')}"]), name
