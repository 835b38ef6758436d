"""A run's losses are those of a plain loop over transformers' model; bench/bench_loss_curve.py follows them longer."""

from __future__ import annotations

from pathlib import Path

import curve_cases
import pytest

pytest.importorskip("transformers")


def test_losses_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    steps = 20
    store = curve_cases.store_of(steps)
    model = curve_cases.write_model(tmp_path / "model")
    ours = curve_cases.ours(store, model, tmp_path / "run", steps)
    theirs = curve_cases.theirs(store, model, steps)
    assert len(ours) == steps
    assert theirs[-1] < theirs[0] - 0.3
    assert ours == pytest.approx(theirs, abs=1e-4)
