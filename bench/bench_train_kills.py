"""Training that is killed with SIGKILL at random instants, those within a save included, and resumed each time.

A tiny model, a checkpoint after every step, so that a good part of the time is saving; runs of float32 and bfloat16
weights, of adapters, of several stages, and with checkpoints written beside the steps take turns. The gates: every
checkpoint that a killed process leaves is that of the uninterrupted run, byte for byte, and so are the final weights.
``extra_info``: kills, those whose newest checkpoint and final weights were equal, and the steps that were lost in all.
"""

from __future__ import annotations

import itertools
import random
import sys
from pathlib import Path

import pytest
from sizes import size

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "train"))
pytest.importorskip("kill_resume", reason="needs a checkout: its helpers are the tests'")

KILLS = int(size("KILLS", 50, quick=5))
EACH = 5  # kills of a run
KINDS = ("float32", "bfloat16", "background", "adapters", "stages")


def config_of(kind, texts, output):
    from kill_resume import run_config

    config = run_config(texts, output, dtype="bfloat16" if kind == "bfloat16" else "float32", steps=12)
    if kind == "background":
        config["train"]["async_save"] = True
    elif kind == "adapters":
        config["lora"] = {"rank": 4}
    elif kind == "stages":
        del config["train"]["epochs"], config["train"]["max_steps"]
        config["stages"] = [{"name": "all", "max_steps": 6}, {"name": "hard", "drop_easy": 0.3, "max_steps": 6}]
    return config


@pytest.mark.timeout(3600)
def test_kills(benchmark, tmp_path):
    from kill_resume import Runner, kill_and_resume, uninterrupted, weights, write_texts

    benchmark.group = f"training killed {KILLS} times at random instants and resumed"
    benchmark.name = "fastsft"
    runner, rng = Runner(), random.Random(0)
    texts = write_texts(tmp_path / "train.jsonl")
    references = {kind: uninterrupted(runner, config_of(kind, texts, tmp_path / kind)) for kind in KINDS}
    rows, finals = [], []

    def run():
        for trial, kind in zip(range(-(-KILLS // EACH)), itertools.cycle(KINDS), strict=False):
            reference, seconds = references[kind]
            config = config_of(kind, texts, tmp_path / f"{kind}-{trial}")
            kills = min(EACH, KILLS - len(rows))
            rows.extend(kill_and_resume(runner, config, reference, kills=kills, seconds=seconds, rng=rng))
            finals.append(weights(Path(config["output"]) / "model") == weights(reference / "model"))

    benchmark.pedantic(run, rounds=1)
    equal = sum(same for *_, same in rows) if all(finals) else 0
    assert len(rows) == equal == KILLS
    benchmark.extra_info |= {
        "kills": KILLS, "equal": equal, "lost_steps": sum(reached - step for reached, step, _ in rows),
    }  # fmt: skip
