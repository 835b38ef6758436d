"""Whole training steps of Qwen2-style decoders against TRL's SFTTrainer and a loop in plain torch.

Every contestant is a process of its own with one thread (``train_contestants.py``), starts from the same model folder
and makes the same steps on the same documents: 2,744 tokens with log-normal lengths, prompts masked. Time is the
process's CPU time, which neighbours on the machine disturb least; with one thread it is the wall time of an idle core.
The first step warms up. The gate: the losses of all steps agree.

TRL is measured padded, as it is by default, and packed (bfd), as it is fastest on a CPU. Its bfloat16 is autocast over
float32 weights; ``torch`` has bfloat16 weights under float32 masters, as fastsft has.
``extra_info``: tokens per second; the peak of memory beyond imports.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from train_case import SIZES, VOCABULARIES, Case, Replay, record_steps

from fastsft.models.tokenizer import Tokenizer
from fastsft.models.weights import init_model, save_model

STEPS = 4  # the first is not counted
DTYPES = {"bf16": "bfloat16", "f32": "float32"}
CONTESTANTS = ("fastsft", "torch", "torch, without float32 weights", "TRL, packed", "TRL, padded")
CHILD = Path(__file__).with_name("train_contestants.py")


CLOCK = Replay()


@functools.cache
def model(size: str, vocabulary: str) -> tuple[Path, int]:
    """The folder of a randomly initialised model, and the number of its parameters."""
    folder = Path(tempfile.mkdtemp(prefix="fastsft-bench-")) / "model"
    decoder = init_model(Case(size, vocabulary, "float32").config, seed=0)
    save_model(decoder, folder)
    Tokenizer.train(["def f(x): return x"], 300).save(folder)
    return folder, sum(p.numel() for p in decoder.parameters())


@functools.cache
def run(contestant: str, case: Case) -> dict[str, Any]:
    """Seconds and losses of the steps, and the peak of memory."""
    folder, _ = model(case.size, case.vocabulary)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FASTSFT_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, CHILD, contestant, case.size, case.vocabulary, case.dtype, folder, str(STEPS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "vocabulary"), list(itertools.product(SIZES, VOCABULARIES)))
def test_training(benchmark, size, vocabulary, dtype, contestant):
    if contestant.startswith("TRL") and importlib.util.find_spec("trl") is None:
        pytest.skip("TRL is not installed")
    if dtype == "f32" and contestant == "torch, without float32 weights":
        pytest.skip("the same as torch")
    case = Case(size, vocabulary, DTYPES[dtype])
    found = run(contestant, case)
    # without float32 weights small updates are lost
    tolerance = 1e-5 if dtype == "f32" else 1e-2 if contestant.endswith("without float32 weights") else 2e-3
    assert found["losses"] == pytest.approx(run("fastsft", case)["losses"], rel=tolerance)

    parameters = model(size, vocabulary)[1]
    title = f"training, {parameters / 1e6:.0f} M parameters, vocabulary {vocabulary}, {dtype}, one thread"
    record_steps(benchmark, CLOCK, found, title)
