"""TRL's SFTTrainer with and without the plug-in (``fastsft.integrations.trl.SFTTrainer``) on the same data.

As in ``bench_train.py``: processes of their own with one thread, the same model folder, the same documents in every
step, CPU time, the first step not counted. The gate: the losses of all steps agree with TRL's padded ones.

Each way that TRL lays out a batch is measured with and without the plug-in; bfloat16 is autocast over float32 weights.
``extra_info``: tokens per second; the peak of memory beyond imports.
"""

from __future__ import annotations

import importlib.util

import pytest
from bench_train import CLOCK, DTYPES, model, run
from train_case import Case, record_steps

SIZE, VOCABULARY = "30 M", "152k"
CONTESTANTS = {
    "fastsft": "TRL with the plug-in, padding-free",
    "fastsft, packed": "TRL with the plug-in, packed",
    "fastsft, padded": "TRL with the plug-in, padded",
    "TRL, padding-free": "TRL, padding-free",
    "TRL, packed": "TRL, packed",
    "TRL, padded": "TRL, padded",
}


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_plugin(benchmark, dtype, contestant):
    if importlib.util.find_spec("trl") is None:
        pytest.skip("TRL is not installed")
    case = Case(SIZE, VOCABULARY, DTYPES[dtype])
    found = run(CONTESTANTS[contestant], case)
    expected = run("TRL, padded", case)["losses"]
    assert found["losses"] == pytest.approx(expected, rel=1e-5 if dtype == "f32" else 2e-3)

    parameters = model(SIZE, VOCABULARY)[1]
    title = f"TRL's trainer, {parameters / 1e6:.0f} M parameters, vocabulary {VOCABULARY}, {dtype}, one thread"
    record_steps(benchmark, CLOCK, found, title)
