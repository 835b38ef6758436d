"""A run that is told to stop, or that must not go on, leaves its folder in order."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_resume import Runner, log_of, newest, run_config, steps_logged
from resume_cases import small, train

from fastsft.config import ConfigError, load_config
from fastsft.train.trainer import NonFiniteError, Trainer
from fastsft.train.update import Update


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_exits(number: signal.Signals, runner: Runner, texts: Path, tmp_path: Path) -> None:
    config = run_config(texts, tmp_path / "run", steps=100_000, save_every=0)
    process = runner.start(config)
    metrics = Path(config["output"]) / "metrics.jsonl"
    deadline = time.monotonic() + 30
    while not (metrics.exists() and len(steps_logged(metrics.parent)) >= 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == 128 + number, log_of(config)
    assert newest(Path(config["output"])) == steps_logged(Path(config["output"]))[-1] >= 2
    log = log_of(config)
    assert "finishing the step and saving it" in log
    assert f"signal {number:d}: saved step" in log
    assert "Traceback" not in log


def test_second_signal_acts_at_once(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """During a step that never ends, where the first one can only be noted."""
    config = small(texts, tmp_path / "run")
    trainer = Trainer(load_config(config), progress=False)

    def endless(*args: Any) -> tuple[float, float]:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second signal did nothing")

    with monkeypatch.context() as patch:
        patch.setattr(Update, "__call__", endless)
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
    assert train(config)[1].steps == 4, "the folder is free again"


def test_signals_are_given_back(texts: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    train(small(texts, tmp_path / "run"))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_two_runs_in_one_folder(runner: Runner, texts: Path, tmp_path: Path) -> None:
    config = run_config(texts, tmp_path / "run", steps=100_000)
    process = runner.start(config)
    deadline = time.monotonic() + 30
    while not newest_name(tmp_path / "run") and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(
        ConfigError, match=rf"output: {tmp_path}/run is in use by another run \(process {process.pid}\)"
    ):
        train(config)
    process.terminate()
    process.join(30)
    assert process.exitcode == 143, "the first run was disturbed: " + log_of(config)


def newest_name(output: Path) -> str:
    """Unlike :func:`newest`, this may be asked while the run goes on."""
    return max((p.name for p in output.glob("checkpoints/step-*")), default="")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_not_finite_names_the_samples_and_leaves_the_weights(dtype: str, texts: Path, tmp_path: Path) -> None:
    config = run_config(texts, tmp_path / "run", dtype=dtype, steps=4)
    trainer = Trainer(load_config(config), progress=False)
    token = int(trainer.stages[0].loader.batch(0, 0).ids[3])
    with torch.no_grad():
        trainer.model.embed_tokens.weight[token] = torch.inf
        if dtype == "bfloat16":
            trainer.optimizer.masters["embed_tokens.weight"][token] = torch.inf
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    with pytest.raises(NonFiniteError, match=r"step 1: .*train\.jsonl:\d+") as stopped:
        trainer.run()
    named = set(re.findall(r"\S+train\.jsonl:\d+", str(stopped.value)))
    assert named in [set(b.sources) for b in trainer.stages[0].batches(0)], "exactly the micro-batch it came from"
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None
    assert newest(tmp_path / "run") == 0
