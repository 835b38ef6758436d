"""The losses of 200 steps in float32 against a plain loop over transformers' model: the same start, the same batches,
torch's AdamW. ``extra_info``: the first and last loss, and the largest difference in any step, which has to stay below
1e-4. The times are those of whole runs with one thread, start and final save included."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fastsft import _C

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "train"))
pytest.importorskip("transformers")
curve_cases = pytest.importorskip("curve_cases", reason="needs a checkout: its helpers are the tests'")

STEPS, LIMIT = 200, 1e-4


@pytest.fixture(scope="module")
def curves():
    threads = torch.get_num_threads(), _C.num_threads()
    torch.set_num_threads(1)
    _C.set_num_threads(1)
    yield {}
    torch.set_num_threads(threads[0])
    _C.set_num_threads(threads[1])


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("contestant", ["fastsft", "transformers"])
def test_losses(benchmark, curves, contestant, tmp_path):
    store, model = curve_cases.store_of(STEPS), curve_cases.write_model(tmp_path / "model")
    benchmark.group = f"losses of {STEPS} training steps, float32"
    if contestant == "fastsft":
        curves[contestant] = benchmark.pedantic(curve_cases.ours, (store, model, tmp_path / "run", STEPS))
    else:
        curves[contestant] = benchmark.pedantic(curve_cases.theirs, (store, model, STEPS))
    losses = curves[contestant]
    assert len(losses) == STEPS
    benchmark.extra_info |= {"first_loss": losses[0], "last_loss": losses[-1]}
    if len(curves) == 2:
        apart = max(abs(a - b) for a, b in zip(*curves.values(), strict=True))
        benchmark.extra_info["largest_difference"] = apart
        assert apart <= LIMIT
