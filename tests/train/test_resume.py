"""A killed run continues to the same bytes; a run that cannot continue says why and touches nothing."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
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
    write_texts,
)

from fastsft.config import ConfigError, load_config
from fastsft.models.weights import load_model, save_model
from fastsft.train import checkpoint
from fastsft.train.metrics import read_metrics
from fastsft.train.trainer import NonFiniteError, Trainer

STEPS = 8
DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("data") / "train.jsonl")


@pytest.fixture(scope="module", params=DTYPES)
def reference(
    request: pytest.FixtureRequest, runner: Runner, texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, float]:
    """(type, output folder, seconds) of the uninterrupted run."""
    dtype: str = request.param
    output = tmp_path_factory.mktemp("reference") / dtype
    return dtype, *uninterrupted(runner, run_config(texts, output, dtype=dtype, steps=STEPS))


def small(texts: Path, output: Path, **train: Any) -> dict[str, Any]:
    return run_config(texts, output, steps=4, **train)


def train(config: dict[str, Any]) -> tuple[Trainer, Any]:
    trainer = Trainer(load_config(config), progress=False)
    return trainer, trainer.run()


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


# An uninterrupted run has 19 renames (the first two and the last belong to the data and the export) and 140 fsyncs.
FAULTS = [("rename", n) for n in (1, 2, 3, 4, 12, 18, 19)] + [("fsync", n) for n in (2, 11, 23, 40, 77)]


@pytest.mark.parametrize(("name", "at"), FAULTS)
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
    update = trainer._update

    def stopping(number: int, *args: Any) -> tuple[float, float]:
        if number == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(number, *args)

    trainer._update = stopping  # type: ignore[method-assign]
    with pytest.raises(SystemExit) as ended:
        trainer.run()
    assert ended.value.code == 143


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


def test_second_signal_acts_at_once(runner: Runner, texts: Path, tmp_path: Path) -> None:
    """During a step that never ends, where the first one can only be noted."""
    config = small(texts, tmp_path / "run")
    trainer = Trainer(load_config(config), progress=False)

    def endless(*args: Any) -> tuple[float, float]:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second signal did nothing")

    trainer._update = endless  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert train(config)[1].steps == 4, "the folder is free again"


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


def test_signals_are_given_back(texts: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    train(small(texts, tmp_path / "run"))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("optim", "lr", 1e-3),
        ("optim", "beta2", 0.9),
        ("train", "accumulation", 1),
        ("train", "max_steps", 5),
        ("data", "prompt_weight", 0.5),
        (None, "seed", 1),
        ("model", "init", {"model_type": "llama"}),
    ],
)
def test_changed_setting_is_refused_by_name(
    section: str | None, key: str, value: Any, texts: Path, tmp_path: Path
) -> None:
    config = small(texts, tmp_path / "run")
    train(config)
    output = tmp_path / "run"
    kept = {p: p.read_bytes() for p in output.rglob("*") if p.is_file() and "data" not in p.parts}
    changed = json.loads(json.dumps(config))
    if section is None:
        changed[key] = value
    elif isinstance(value, dict):
        changed[section][key].update(value)
    else:
        changed[section][key] = value
    with pytest.raises(ConfigError, match=f"other settings: .*{key if section is None else f'{section}.{key}'}"):
        train(changed)
    for path, content in kept.items():
        assert path.read_bytes() == content, f"{path.name} was changed by a refused resume"


def test_changed_data_is_refused(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "train.jsonl")
    config = small(texts, tmp_path / "run")
    train(config)
    write_texts(texts, seed=1)
    with pytest.raises(ConfigError, match="other settings: the data"):
        train(config)


@pytest.mark.parametrize("change", ["weights", "config.json"])
def test_changed_start_is_refused(change: str, texts: Path, tmp_path: Path) -> None:
    start = tmp_path / "start"
    _, first = train(small(texts, tmp_path / "first"))
    shutil.copytree(first.model_path, start)
    config = small(texts, tmp_path / "run")
    config["model"] = {"path": str(start), "dtype": "float32"}
    config["tokenizer"] = {}
    train(config)
    if change == "weights":
        model = load_model(start)
        with torch.no_grad():
            model.embed_tokens.weight[3, 5] += 1e-3
        save_model(model, start)
    else:
        fields = json.loads((start / "config.json").read_text())
        (start / "config.json").write_text(json.dumps(fields | {"rope_theta": 5e5}))
    with pytest.raises(ConfigError, match=r"other settings: the model it started from \(weights or config\.json\)\."):
        train(config)


def test_the_same_start_in_other_files_is_not_refused(texts: Path, tmp_path: Path) -> None:
    start = tmp_path / "start"
    _, first = train(small(texts, tmp_path / "first"))
    shutil.copytree(first.model_path, start)
    config = small(texts, tmp_path / "run")
    config["model"] = {"path": str(start), "dtype": "float32"}
    config["tokenizer"] = {}
    train(config)
    save_model(load_model(start), start, max_shard_bytes=10_000)
    assert not (start / "model.safetensors").exists()
    assert train(config)[1].resumed_from == 4


def test_a_finished_run_knows_its_losses(texts: Path, tmp_path: Path) -> None:
    config = small(texts, tmp_path / "run")
    _, first = train(config)
    _, second = train(config)
    assert second.resumed_from == second.steps == 4
    assert second.train_loss == first.train_loss
    assert second.tokens_per_second is None


def test_settings_without_effect_may_change(texts: Path, tmp_path: Path) -> None:
    config = small(texts, tmp_path / "run")
    _, first = train(config)
    bytes_before = weights(first.model_path)
    config["train"].update(eval_every=2, save_every=3, keep=1)
    _, second = train(config)
    assert second.resumed_from == 4
    assert weights(second.model_path) == bytes_before
    assert second.eval_before == first.eval_before
    assert second.eval_after == first.eval_after


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_names_the_samples_and_leaves_the_weights(dtype: str, texts: Path, tmp_path: Path) -> None:
    config = run_config(texts, tmp_path / "run", dtype=dtype, steps=4)
    trainer = Trainer(load_config(config), progress=False)
    token = int(trainer.loader.batch(0, 0).ids[3])
    with torch.no_grad():
        trainer.model.embed_tokens.weight[token] = torch.inf
        if dtype == "bfloat16":
            trainer.optimizer.masters["embed_tokens.weight"][token] = torch.inf
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    with pytest.raises(NonFiniteError, match=r"step 1: .*train\.jsonl:\d+") as stopped:
        trainer.run()
    named = set(re.findall(r"\S+train\.jsonl:\d+", str(stopped.value)))
    assert named in [set(b.sources) for b in trainer._batches(0)], "exactly the micro-batch it came from"
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None
    assert newest(tmp_path / "run") == 0


def test_keeps_as_many_checkpoints_as_asked(texts: Path, tmp_path: Path) -> None:
    train(small(texts, tmp_path / "run", keep=2))
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]


def test_damaged_newer_checkpoint_does_not_push_out_a_good_one(tmp_path: Path) -> None:
    """With keep=1 the checkpoint just written must survive, whatever broken folder has a higher number."""

    def fill(folder: Path) -> None:
        (folder / "file").write_text("content")

    checkpoint.write(tmp_path, 9, {"step": 9}, fill, keep=1)
    (tmp_path / "step-00000009" / "file").write_text("damaged")
    assert checkpoint.latest(tmp_path, lambda message: None) is None
    checkpoint.write(tmp_path, 1, {"step": 1}, fill, keep=1)
    found = checkpoint.latest(tmp_path, lambda message: None)
    assert found is not None
    assert found.step == 1


def test_failed_write_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "file").write_text("content")

    def full(folder: Path) -> None:
        (folder / "file").write_text("cont")
        raise OSError(28, "No space left on device")

    checkpoint.write(tmp_path, 1, {"step": 1}, fill, keep=1)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write(tmp_path, 2, {"step": 2}, full, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.verify(tmp_path / "step-00000001") is None
