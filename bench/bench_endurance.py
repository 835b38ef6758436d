"""A long run of a small model: 2,000 steps of ``fastsft.train`` in a process of its own, with one thread, checkpoints
and evaluations on the way. The gate: its memory grows by less than 1 MiB in 100 steps, the slowest step in a hundred
takes at most 1.2 times the median, and the number of open files stays the same. All batches are of one size.

A step's time is CPU time, and the least of four runs: they do the same work bit for bit, so that what differs between
them is the machine (neighbours, clock speed), and what is slow in all four is the trainer. The first quarter of the
steps warms up. ``extra_info``: the largest growth, the ratio, the slowest step by the median, the median of the four
runs' own ratios.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from sizes import QUICK
from train_case import Replay

STEPS, LENGTH, CAPACITY = 2000, 64, 512
MODEL = {
    "model_type": "qwen2", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip
CLOCK = Replay()


def train(output: str) -> None:
    from fastsft._C import keep_freed_memory
    from fastsft.data.batch import Sample
    from fastsft.data.prepare import Prepared
    from fastsft.data.store import SampleStore
    from fastsft.models.tokenizer import Tokenizer
    from fastsft.train.trainer import Trainer

    time.perf_counter = time.process_time  # the trainer reports its steps on the former
    keep_freed_memory()  # as the command does
    rng = np.random.default_rng(0)
    stores = []
    for count in (40 * CAPACITY // LENGTH, 16):
        ids = rng.integers(0, MODEL["vocab_size"], (count, LENGTH), dtype=np.int32)
        stores.append(SampleStore.from_samples(Sample(row, np.ones(LENGTH, np.float32)) for row in ids))
    prepared = Prepared(*stores, Tokenizer.train(["def f(x): return x"], 300), {"key": "endurance"})
    config = {
        "output": output,
        "model": {"init": MODEL, "dtype": "bfloat16"},
        "data": {"max_length": LENGTH},
        "train": {"tokens_per_batch": CAPACITY, "max_steps": STEPS, "epochs": STEPS, "save_every": 250,
                  "eval_every": 250},
    }  # fmt: skip
    Trainer(config, prepared=prepared, progress=False).run()


def steps_of(metrics: Path) -> list[dict[str, float]]:
    """The steps that the log has so far; its last line may be half written."""
    lines = metrics.read_bytes().split(b"\n")[:-1] if metrics.exists() else []
    return [row for row in map(json.loads, lines) if row["kind"] == "step"]


def watch(process: subprocess.Popen[bytes], metrics: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(step, resident MiB, open files), sampled until the process ends."""
    samples = []
    root = Path("/proc") / str(process.pid)
    while process.poll() is None:
        time.sleep(0.5)
        try:
            resident = int((root / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
            files = sum(
                1 for entry in (root / "fd").iterdir() if not os.readlink(entry).startswith(str(metrics.parent))
            )
        except (FileNotFoundError, IndexError, PermissionError):  # it ended, or closed a file, in between
            continue
        # counted, not parsed: what the watcher does pushes the run out of the caches that they share
        steps = metrics.read_bytes().count(b'"kind":"step"') if metrics.exists() else 0
        samples.append((steps, resident, files))
    assert process.returncode == 0
    return tuple(np.array(samples).T)


def one_run(output: Path) -> tuple[np.ndarray, float, np.ndarray]:
    """The seconds of each step after the warm-up, the memory's growth in MiB per 100 steps, and its open files."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FASTSFT_NUM_THREADS": "1"}
    metrics = output / "metrics.jsonl"
    process = subprocess.Popen([sys.executable, __file__, str(output)], env=environment)
    step, resident, files = watch(process, metrics)
    rows = steps_of(metrics)
    assert len(rows) == STEPS
    late = (step > STEPS // 4) & (step < STEPS)
    growth = np.polyfit(step[late], resident[late], 1)[0] * 100
    return np.array([row["seconds"] for row in rows[STEPS // 4 :]]), float(growth), files[late]


def p99_to_p50(seconds: np.ndarray) -> float:
    half, most = np.quantile(seconds, [0.5, 0.99])
    return float(most / half)


@pytest.mark.skipif(QUICK, reason="short, it would show nothing")
@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.timeout(3600)
def test_endurance(benchmark, tmp_path):
    runs = [one_run(tmp_path / str(number)) for number in range(4)]
    seconds = np.min([run[0] for run in runs], axis=0)
    benchmark.group = f"{STEPS} training steps, {CAPACITY} tokens each, one thread"
    replayed = iter(seconds)
    benchmark.pedantic(lambda: CLOCK.advance(next(replayed)), rounds=len(seconds))
    benchmark.extra_info |= {
        "MiB_per_100_steps": max(growth for _, growth, _ in runs),
        "p99_to_p50": p99_to_p50(seconds),
        "p99_to_p50_of_one_run": float(np.median([p99_to_p50(run[0]) for run in runs])),
        "slowest_to_p50": float(seconds.max() / np.median(seconds)),
        "open_files": int(max(files.max() for _, _, files in runs)),
    }
    assert all(growth < 1 for _, growth, _ in runs)
    assert all(files.min() == files.max() for _, _, files in runs)
    assert p99_to_p50(seconds) <= 1.2


if __name__ == "__main__":
    train(sys.argv[1])
