"""Runs of several processes against the same run in one: gradients, weights, faults, kills, other numbers of them."""

from __future__ import annotations

import functools
import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from kill_resume import newest, run_config, steps_logged, weights
from ranks import Ranks, gradients_rank, poisoned_rank, train_rank
from torch.distributed.fsdp import FSDPModule
from train_cases import gradients_of_a_step

import fastsft
from fastsft.train.metrics import read_metrics

SUMS = hasattr(FSDPModule, "set_force_sum_reduction_for_comms")
FSDP = pytest.param("fsdp", marks=pytest.mark.skipif(not SUMS, reason="FSDP of this torch cannot sum gradients"))
MODES = pytest.mark.parametrize("mode", ["ddp", FSDP])


def config_of(texts: Path, output: Path, mode: str = "ddp", **train: Any) -> dict[str, Any]:
    """Three steps of five micro-batches, so that neither two nor four processes get equally many."""
    return run_config(texts, output, **{"steps": 3, "accumulation": 5, "parallel": mode, **train})


def run(size: int, config: dict[str, Any]) -> dict[str, Any]:
    """To the end in ``size`` processes: what the first one's result says."""
    ranks = Ranks(size, Path(config["output"] + ".log"), train_rank, config)
    assert ranks.join() == [0] * size, ranks.text(0)
    found: dict[str, Any] = json.loads(Path(config["output"] + ".json").read_text())
    return found


def distance(ours: Path, theirs: Path) -> float:
    """Of two models, relative to the second, over all weights."""
    a, b = (safetensors.torch.load_file(folder / "model" / "model.safetensors") for folder in (ours, theirs))
    assert a.keys() == b.keys()
    off = torch.stack([(a[n].double() - b[n].double()).norm() for n in a]).norm()
    return float(off / torch.stack([t.double().norm() for t in b.values()]).norm())


@pytest.fixture(scope="module")
def alone(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process."""
    output = tmp_path_factory.mktemp("alone") / "run"
    fastsft.train(config_of(texts, output), progress=False)
    return output


@pytest.fixture(scope="module")
def finished(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """The run in so many processes."""

    @functools.cache
    def make(mode: str, size: int) -> Path:
        output = tmp_path_factory.mktemp(mode) / "run"
        run(size, config_of(texts, output, mode))
        return output

    return make


@pytest.fixture(scope="module")
def stopped(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run in two processes, of which one gets a signal in the first step."""

    @functools.cache
    def make(mode: str) -> Path:
        output = tmp_path_factory.mktemp(mode) / "run"
        ranks = Ranks(2, Path(f"{output}.log"), train_rank, config_of(texts, output, mode), 1)
        assert ranks.join() == [143, 143], ranks.text(0)
        return output

    return make


@MODES
@pytest.mark.parametrize("size", [2, 4])
def test_a_run_is_that_of_one_process(size: int, mode: str, alone: Path, finished: Callable[[str, int], Path]) -> None:
    output = finished(mode, size)
    assert distance(output, alone) <= 1e-6
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (output, alone))
    assert [(m["kind"], m["step"]) for m in ours] == [(m["kind"], m["step"]) for m in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for name in {"loss", "tokens", "grad_norm", "sources"} & other.keys():
            assert one[name] == pytest.approx(other[name], rel=1e-6), (one["kind"], one["step"], name)


@MODES
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_those_of_one_process(dtype: str, mode: str, tmp_path: Path) -> None:
    """Three processes, four micro-batches; the last step of an epoch may have even fewer than processes."""
    ranks = Ranks(3, tmp_path / "log", gradients_rank, dtype, mode, str(tmp_path / "found.pt"))
    assert ranks.join() == [0, 0, 0], ranks.text(0)
    for count, found in torch.load(tmp_path / "found.pt").items():
        expected = gradients_of_a_step(getattr(torch, dtype), count)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert found[name].dtype == torch.float32
            # each micro-batch's own gradient is the same, and rounded before it is added
            assert float((found[name] - gradient).norm() / gradient.norm()) <= 1e-6, (count, name)


@MODES
def test_not_finite_in_one_process_stops_all(mode: str, texts: Path, tmp_path: Path) -> None:
    config = config_of(texts, tmp_path / "run", mode)
    ranks = Ranks(2, tmp_path / "log", poisoned_rank, config, 3)
    assert ranks.join() == [0, 0], ranks.text(0) + ranks.text(1)
    told = [ranks.text(rank).strip().splitlines()[-1] for rank in range(2)]
    assert told[0] == told[1]
    assert told[0].startswith("right: step 1: loss is nan; stopped before the update")


@MODES
def test_killed_runs_end_in_the_same_bytes(
    mode: str, texts: Path, finished: Callable[[str, int], Path], tmp_path: Path
) -> None:
    config = config_of(texts, tmp_path / "run", mode)
    ranks = Ranks(2, tmp_path / "log", train_rank, config, 3, signal.SIGKILL)
    wait_for_step(tmp_path / "run", 2)
    ranks.processes[1].join(60)
    ranks.kill()
    assert not (tmp_path / "run" / "model").exists(), "it was killed too late"
    assert run(2, config)["from"] in (1, 2)
    assert weights(tmp_path / "run" / "model") == weights(finished(mode, 2) / "model")
    assert steps_logged(tmp_path / "run") == [1, 2, 3]


@MODES
def test_a_signal_to_one_process_saves_and_ends_all(mode: str, stopped: Callable[[str], Path]) -> None:
    assert newest(stopped(mode)) == steps_logged(stopped(mode))[-1] == 1


@MODES
@pytest.mark.parametrize("size", [1, 4])
def test_another_number_of_processes_goes_on(
    size: int, mode: str, texts: Path, alone: Path, stopped: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(stopped(mode), tmp_path / "run")
    config = config_of(texts, tmp_path / "run", mode)
    if size == 1:
        assert fastsft.train(config, progress=False).resumed_from == 1
    else:
        assert run(size, config)["from"] == 1
    assert distance(tmp_path / "run", alone) <= 1e-6


def wait_for_step(output: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (output / "metrics.jsonl").exists() and max(steps_logged(output), default=0) >= step:
            return
        time.sleep(0.01)
    raise TimeoutError(f"no step {step} in {output}")
