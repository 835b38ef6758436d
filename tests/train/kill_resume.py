"""Kills training processes at random instants and checks that what is resumed ends in the same bytes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

FAULT_EXIT = 77
# One server serves all that one process starts, with the list of the first to ask: the second and third entry are for
# processes that shard a model, the last for reading a configuration.
PRELOAD = ["fastsft.train.trainer", "fastsft.train.shards", "torch._dynamo", "pydantic"]
WORDS = ["def", "return", "yield", "lambda", "class", "import", "value", "index", "total", "range", "print", "while"]


def write_texts(path: Path, count: int = 48, seed: int = 0) -> Path:
    """A JSONL file of short generated programs."""
    rng = random.Random(seed)
    rows = [{"text": " ".join(rng.choices(WORDS, k=rng.randint(4, 24)))} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_config(texts: Path, output: Path, *, dtype: str = "float32", steps: int = 12, **train: Any) -> dict[str, Any]:
    """A run of a few seconds at most: two layers, a checkpoint after every step, every one of them kept."""
    return {
        "output": str(output),
        "model": {
            "dtype": dtype,
            "init": {
                "model_type": "qwen3",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 32,
                "max_position_embeddings": 128,
            },
        },
        "tokenizer": {"train_vocab": 300},
        "data": {"train": [str(texts)], "max_length": 96, "eval_fraction": 0.1},
        "optim": {"lr": 3e-3, "weight_decay": 0.1},
        "train": {
            "tokens_per_batch": 96,
            "accumulation": 2,
            "epochs": 50,
            "max_steps": steps,
            "eval_every": 0,
            "save_every": 1,
            "keep": steps,
            **train,
        },
    }


def train_in_child(config: dict[str, Any], log: str, fault: tuple[str, int] | None) -> None:
    """Runs in the child: train, or leave without any clean-up at the n-th call of ``os.<name>``."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 2)
    import torch

    import fastsft

    torch.set_num_threads(1)
    if fault is not None:
        name, at = fault
        original, calls = getattr(os, name), 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                os._exit(FAULT_EXIT)
            return original(*args, **kwargs)

        setattr(os, name, counted)
        fastsft.train(config)
        os.write(2, f"calls of {name}: {calls}\n".encode())
    else:
        fastsft.train(config)


class Runner:
    """Starts training processes from a server that has already imported torch, so that a start costs milliseconds."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)

    def start(self, config: dict[str, Any], *, fault: tuple[str, int] | None = None) -> Any:
        log = str(config["output"]) + ".log"
        process = self._context.Process(target=train_in_child, args=(config, log, fault))
        process.start()
        return process

    def finish(self, config: dict[str, Any], *, fault: tuple[str, int] | None = None) -> int:
        """Run to the end; the exit status."""
        process = self.start(config, fault=fault)
        process.join()
        return int(process.exitcode)


def log_of(config: dict[str, Any]) -> str:
    return Path(str(config["output"]) + ".log").read_text()


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def steps_logged(output: Path) -> list[int]:
    from fastsft.train.metrics import read_metrics

    return [m["step"] for m in read_metrics(output / "metrics.jsonl") if m["kind"] == "step"]


def newest(output: Path) -> int:
    """Step of the newest checkpoint that verifies; 0 if there is none."""
    from fastsft.train import checkpoint

    found = checkpoint.latest(output / "checkpoints", lambda message: None)
    return found.step if found else 0


def same_checkpoint(output: Path, reference: Path, step: int) -> bool:
    """Weights and optimizer state of a step are those of the uninterrupted run, byte for byte."""
    if step == 0:
        return True
    ours, theirs = (root / "checkpoints" / f"step-{step:08d}" for root in (output, reference))
    files = [{p.relative_to(f): p for p in f.rglob("*.safetensors")} for f in (ours, theirs)]
    return files[0].keys() == files[1].keys() and all(
        p.read_bytes() == files[1][n].read_bytes() for n, p in files[0].items()
    )


def uninterrupted(runner: Runner, config: dict[str, Any]) -> tuple[Path, float]:
    """The reference run: its output folder and how long a process of it takes, started from a warm server."""
    runner.finish({"output": str(config["output"]) + ".warm"})  # an empty configuration: fails once all is imported
    began = time.perf_counter()
    if runner.finish(config) != 0:
        raise RuntimeError(log_of(config))
    return Path(config["output"]), time.perf_counter() - began


def kill_and_resume(
    runner: Runner, config: dict[str, Any], reference: Path, *, kills: int, seconds: float, rng: random.Random
) -> list[tuple[int, int, bool]]:
    """Kill the run ``kills`` times at uniform instants of its ``seconds``, then let it finish.

    A process that was done before its kill starts over in an empty folder.

    Returns:
        Per kill: the last step logged, the step the next process resumes from, and whether that checkpoint is the
        uninterrupted run's.
    """
    output = Path(config["output"])
    rows = []
    while len(rows) < kills:
        process = runner.start(config)
        time.sleep(rng.uniform(0, seconds))
        process.kill()
        process.join()
        if process.exitcode == 0:
            shutil.rmtree(output)
            continue
        reached = max(steps_logged(output), default=0) if (output / "metrics.jsonl").exists() else 0
        step = newest(output)
        rows.append((reached, step, same_checkpoint(output, reference, step)))
    if runner.finish(config) != 0:
        raise RuntimeError(log_of(config))
    return rows
