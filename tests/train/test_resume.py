"""A killed run continues to the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from kill_resume import (
    FAULT_EXIT,
    Runner,
    kill_and_resume,
    log_of,
    newest,
    run_config,
    same_checkpoint,
    steps_logged,
    uninterrupted,
    weights,
)
from resume_cases import small, train

from fastsft.config import load_config
from fastsft.train.metrics import read_metrics
from fastsft.train.trainer import Trainer
from fastsft.train.update import StepResult, Update

STEPS = 8


@pytest.fixture(scope="module")
def references(
    runner: Runner, texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, float]]:
    """Output folder and seconds of the uninterrupted run of a type, which is made once."""

    @cache
    def reference_of(dtype: str) -> tuple[Path, float]:
        output = tmp_path_factory.mktemp("reference") / dtype
        return uninterrupted(runner, run_config(texts, output, dtype=dtype, steps=STEPS))

    return reference_of


@pytest.fixture(params=["float32", "bfloat16"])
def reference(
    request: pytest.FixtureRequest, references: Callable[[str], tuple[Path, float]]
) -> tuple[str, Path, float]:
    """(type, output folder, seconds) of the uninterrupted run."""
    dtype: str = request.param
    return dtype, *references(dtype)


def check_same(config: dict[str, Any], reference: Path) -> None:
    output = Path(config["output"])
    assert weights(output / "model") == weights(reference / "model")
    assert steps_logged(output) == list(range(1, STEPS + 1))
    assert [p.name for p in output.glob(".*")] == [".lock"], "temporary folders left behind"
    assert not list((output / "checkpoints").glob(".*"))
    logged = [
        [{k: m[k] for k in ("step", "loss", "lr", "grad_norm", "tokens")} for m in read_metrics(o / "metrics.jsonl")
         if m["kind"] == "step"] for o in (output, reference)
    ]  # fmt: skip
    assert logged[0] == logged[1]
    evals = [m["step"] for m in read_metrics(output / "metrics.jsonl") if m["kind"] == "eval"]
    assert evals == [0, STEPS]


def test_killed_runs_end_in_the_same_bytes(
    reference: tuple[str, Path, float], runner: Runner, texts: Path, tmp_path: Path
) -> None:
    dtype, folder, seconds = reference
    config = run_config(texts, tmp_path / "run", dtype=dtype, steps=STEPS)
    rows = kill_and_resume(runner, config, folder, kills=4, seconds=seconds, rng=random.Random())
    assert rows
    assert all(same for *_, same in rows), rows
    check_same(config, folder)


# An uninterrupted run has 21 renames (the first four and the last belong to the data and the export) and 202 fsyncs.
FAULTS = [("rename", n) for n in (1, 2, 3, 4, 5, 12, 20, 21)] + [("fsync", n) for n in (2, 11, 23, 40, 77, 150)]


# Where a process is lost has nothing to do with the element type: the two take turns.
@pytest.mark.parametrize(
    ("reference", "name", "at"),
    [(("float32", "bfloat16")[i % 2], *fault) for i, fault in enumerate(FAULTS)],
    indirect=["reference"],
)
def test_process_lost_at_a_system_call(
    name: str, at: int, reference: tuple[str, Path, float], runner: Runner, texts: Path, tmp_path: Path
) -> None:
    dtype, folder, _ = reference
    config = run_config(texts, tmp_path / "run", dtype=dtype, steps=STEPS)
    assert runner.finish(config, fault=(name, at)) == FAULT_EXIT
    step = newest(Path(config["output"]))
    assert same_checkpoint(Path(config["output"]), folder, step)
    assert runner.finish(config) == 0, log_of(config)
    check_same(config, folder)


@pytest.mark.parametrize("at", [1, 2])
def test_process_lost_while_replacing_the_exported_model(
    at: int, reference: tuple[str, Path, float], runner: Runner, texts: Path, tmp_path: Path
) -> None:
    dtype, folder, _ = reference
    config = run_config(texts, tmp_path / "run", dtype=dtype, steps=STEPS)
    shutil.copytree(folder, config["output"])
    assert runner.finish(config, fault=("rename", at)) == FAULT_EXIT
    assert runner.finish(config) == 0, log_of(config)
    check_same(config, folder)


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "missing file", "missing manifest", "empty manifest"])
def test_damaged_checkpoint_falls_back_with_a_warning(
    damage: str, reference: tuple[str, Path, float], texts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dtype, folder, _ = reference
    config = run_config(texts, tmp_path / "run", dtype=dtype, steps=STEPS)
    output = Path(config["output"])
    stop_at(config, 5)
    file = output / "checkpoints" / "step-00000005" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "flipped bit":
        content[len(content) * 2 // 3] ^= 4
        file.write_bytes(content)
    elif damage == "truncated":
        file.write_bytes(content[:-1])
    elif damage == "missing file":
        file.unlink()
    elif damage == "missing manifest":
        (file.parent / "manifest.json").unlink()
    else:
        (file.parent / "manifest.json").write_text("{}\n")
    capfd.readouterr()
    result = Trainer(load_config(config)).run()
    message = capfd.readouterr().err
    assert "step-00000005 is damaged" in message
    assert "falling back" in message
    assert result.resumed_from == 4
    check_same(config, folder)


def stop_at(config: dict[str, Any], step: int) -> None:
    """Run as SIGTERM during ``step`` would end it."""
    trainer = Trainer(load_config(config), progress=False)
    update = Update.__call__

    def stopping(self: Update, number: int, *args: Any) -> StepResult:
        if number == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, number, *args)

    with mock.patch.object(Update, "__call__", stopping), pytest.raises(SystemExit) as ended:
        trainer.run()
    assert ended.value.code == 143


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stopped_in_every_step_of_two_epochs(dtype: str, texts: Path, tmp_path: Path) -> None:
    def config_in(folder: str) -> dict[str, Any]:
        return run_config(texts, tmp_path / folder, dtype=dtype, steps=1000, epochs=2, keep=1)

    whole, result = train(config_in("whole"))
    assert whole.stages[0].epoch(result.steps - 1) == 1, "the second epoch is not reached"
    for step in range(1, result.steps):
        stop_at(config_in("run"), step)
    _, last = train(config_in("run"))
    assert last.resumed_from == result.steps - 1
    for name in (f"checkpoints/step-{result.steps:08d}/optimizer.safetensors", "model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_run_knows_its_losses(texts: Path, tmp_path: Path) -> None:
    config = small(texts, tmp_path / "run")
    _, first = train(config)
    _, second = train(config)
    assert second.resumed_from == second.steps == 4
    assert second.train_loss == first.train_loss
    assert second.tokens_per_second is None


def test_a_mixture_continues_to_the_same_bytes(texts: Path, tmp_path: Path) -> None:
    lines = texts.read_text().splitlines(keepends=True)
    sources = []
    for name, part, weight in (("a", lines[::2], 0.1), ("b", lines[1::2], 0.6)):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
        sources.append({"name": name, "files": [str(tmp_path / f"{name}.jsonl")], "weight": weight})

    def config_in(folder: str) -> dict[str, Any]:
        config = run_config(texts, tmp_path / folder, steps=STEPS, epochs=4)
        return {**config, "data": {**config["data"], "train": [], "sources": sources}}

    whole, _ = train(config_in("whole"))
    assert whole.stages[0].epoch(STEPS - 1) > 0, "the second epoch, in which source b begins anew, is not reached"
    stop_at(config_in("run"), 5)
    _, result = train(config_in("run"))
    assert result.resumed_from == 5
    check_same(config_in("run"), tmp_path / "whole")
