"""Trackers get what metrics.jsonl gets, each step once also after a resume; a missing package is told at once."""

from __future__ import annotations

import importlib.machinery
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from resume_cases import small, train

from fastsft.config import ConfigError, load_config
from fastsft.train import trackers
from fastsft.train.metrics import read_metrics
from fastsft.train.trainer import Trainer

Sent = list[tuple[int, dict[str, float]]]


class Service:
    """Stands in for wandb and trackio: keeps what each run got, by the name that a resume gives again."""

    def __init__(self) -> None:
        self.runs: dict[str, Sent] = {}
        self.opened: list[dict[str, Any]] = []

    def init(self, **given: Any) -> Any:
        self.opened.append(given)
        sent = self.runs.setdefault(given.get("id") or given["name"], [])
        return types.SimpleNamespace(
            log=lambda values, step: sent.append((step, values)), finish=lambda: sent.append((-1, {}))
        )

    def install(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.init = self.init  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)


def killed_and_resumed(config: dict[str, Any], output: Path) -> None:
    """All steps, then as a run has it that lost its last two: its checkpoints are gone, its log and trackers not."""
    train(config)
    for step in (3, 4):
        shutil.rmtree(output / "checkpoints" / f"step-{step:08d}")
    train(config)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_services(name: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service()
    service.install(name, monkeypatch)
    output = tmp_path / "run"
    config = small(texts, output) | {"log": {name: "project"}}
    killed_and_resumed(config, output)
    (sent,) = service.runs.values()
    assert [given["project"] for given in service.opened] == ["project"] * 2
    assert all(given["resume"] == "allow" for given in service.opened)
    logged = [m for m in read_metrics(output / "metrics.jsonl") if m["kind"] == "step"]
    found = [
        (step, values["step/loss"], values["step/sources/train"]) for step, values in sent if "step/loss" in values
    ]
    assert found == [(m["step"], m["loss"], m["sources"]["train"]) for m in logged]
    assert [step for step, values in sent if "eval/loss" in values] == [0, 4]
    assert sum(step == -1 for step, _ in sent) == 2  # both processes finished it
    shutil.rmtree(output)
    train(config)
    assert len(service.runs) == 2, "a run that begins anew is another one"


def test_tensorboard(texts: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    output = tmp_path / "run"
    config = small(texts, output) | {"log": {"tensorboard": True}, "samples": {"prompts": ["def"], "max_tokens": 2}}
    killed_and_resumed(config, output)
    events = accumulator.EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    logged = [m for m in read_metrics(output / "metrics.jsonl") if m["kind"] == "step"]
    for name in ("loss", "lr", "grad_norm"):
        found = [(e.step, e.value) for e in events.Scalars(f"step/{name}")]
        assert found == [(m["step"], pytest.approx(m[name])) for m in logged]
    assert "step/phases/optimizer" in events.Tags()["scalars"]
    assert "sample/def/text_summary" in events.Tags()["tensors"]


def test_missing_packages(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    for key, value in (("tensorboard", True), ("wandb", "p"), ("trackio", "p")):
        config = load_config(small(texts, tmp_path / "run") | {"log": {key: value}})
        with pytest.raises(
            ConfigError, match=rf'log\.{key}: the package is not installed; pip install "fastsft\[track'
        ):
            Trainer(config, progress=False)
    assert not (tmp_path / "run").exists()
