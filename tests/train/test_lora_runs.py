"""Runs that train adapters: frozen weights stay, resumed runs end in the same bytes, the export is what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kill_resume import run_config, weights
from resume_cases import train
from test_resume import stop_at

from fastsft.config import ConfigError, load_config
from fastsft.models.adapter import load_adapter
from fastsft.models.decoder import Decoder
from fastsft.models.lora import merge_lora
from fastsft.models.weights import load_model
from fastsft.train import start, state
from fastsft.train import trainer as trainer_module
from fastsft.train.trainer import Trainer

copy_of = state.copied


def adapted(texts: Path, output: Path, dtype: str = "float32", **lora: Any) -> dict[str, Any]:
    return {**run_config(texts, output, dtype=dtype, steps=5), "lora": {"rank": 4, **lora}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_of_adapters_continues_to_the_same_bytes(dtype: str, texts: Path, tmp_path: Path) -> None:
    _, whole = train(adapted(texts, tmp_path / "whole", dtype))
    config = adapted(texts, tmp_path / "run", dtype)
    stop_at(config, 3)
    _, result = train(config)
    assert result.resumed_from == 3
    assert weights(result.model_path) == weights(whole.model_path)
    names = {p.name for p in (tmp_path / "run" / "checkpoints" / "step-00000004").rglob("*")}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names, "a checkpoint holds the adapters alone"


def test_copies_share_what_is_frozen(texts: Path, tmp_path: Path) -> None:
    """Those of checkpoints written beside the steps, and of asft's reference; and they see no step."""
    config = adapted(texts, tmp_path / "run") | {"objective": {"name": "asft"}}
    config["train"]["async_save"] = True
    copies: list[Decoder] = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (trainer_module, state):
            patch.setattr(module, "copied", lambda model: copies.append(copy_of(model)) or copies[-1])
        train(config)
    assert len(copies) == 1 + 5
    adapters = []
    for made in copies:
        for name, parameter in made.named_parameters():
            if "lora" not in name:
                assert parameter is copies[0].get_parameter(name), name
        adapters.append(torch.cat([p.detach().flatten() for n, p in made.named_parameters() if "lora_B" in n]))
    assert not adapters[0].any()
    assert len({tuple(a.tolist()) for a in adapters}) == 1 + 4, "the last rate is 0"


def test_the_export_is_the_base_and_its_adapter(texts: Path, tmp_path: Path) -> None:
    config = adapted(texts, tmp_path / "run", targets=["q_proj", "down_proj"])
    _, result = train(config)
    assert result.eval_after is not None
    assert result.eval_before is not None
    assert result.eval_after.loss < result.eval_before.loss
    resolved = load_config(config)
    base = start.build_model(resolved, vocab_size=300)
    plain = {n: p.detach().clone() for n, p in base.named_parameters()}
    load_adapter(base, tmp_path / "run" / "adapter")
    merge_lora(base)
    merged = dict(base.named_parameters())
    exported = dict(load_model(result.model_path, dtype=torch.float32).named_parameters())
    for name, parameter in exported.items():
        assert torch.equal(parameter, merged[name]), name
        changed = name.endswith(("q_proj.weight", "down_proj.weight"))
        assert torch.equal(parameter, plain[name]) != changed, name


def test_unknown_targets_are_named(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora\.targets: expected names of linear layers .* got 'query'"):
        Trainer(load_config(adapted(texts, tmp_path / "run", targets=["query"])), progress=False)
