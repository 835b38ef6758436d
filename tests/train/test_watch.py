"""Signals: spikes against a plain computation with numpy, the first steps, and a run that finds one."""

from __future__ import annotations

import numpy as np
import pytest

from fastsft.train.watch import Watch, early_steps


def rows(losses: list[float], norm: float = 1.0) -> list[dict[str, object]]:
    return [{"kind": "step", "step": i + 1, "loss": x, "grad_norm": norm} for i, x in enumerate(losses)]


def test_spikes_are_those_of_median_and_mad() -> None:
    rng = np.random.default_rng(0)
    losses = 2 + rng.normal(0, 0.1, 400)
    losses[[50, 51, 130, 300]] += [2, 2, 0.3, 1]
    watch, found = Watch(), []
    for i, loss in enumerate(losses.tolist()):
        spikes = watch.see(loss, 1.0, [f"rows.jsonl:{i}"])
        assert all(s.name == "loss" and s.samples == (f"rows.jsonl:{i}",) for s in spikes)
        found += [i] * len(spikes)
        if i >= 20:
            window = losses[max(0, i - 100) : i]
            mad = np.median(np.abs(window - np.median(window)))
            assert (found[-1:] == [i]) == (loss > np.median(window) + 6 * 1.4826 * mad)
    assert found == [50, 51, 300]


def test_six_sigma_are_8_9_median_absolute_deviations() -> None:
    """Median 1, median absolute deviation 0.1."""
    history = rows([0.9, 1.1] * 10)
    assert Watch(history).see(1.88, 1.0, []) == []
    (spike,) = Watch(history).see(1.90, 1.0, [])
    assert spike.sigma == pytest.approx(0.14826)


def test_gradient_norm_too_and_only_upwards() -> None:
    watch = Watch(rows([1.0] * 30))
    assert watch.see(0.1, 0.1, []) == []
    (spike,) = watch.see(1.0, 1.5, ["a:1"])
    assert (spike.name, spike.centre) == ("grad_norm", 1.0)
    assert "gradient norm 1.5 is a spike: 50 sigma above 1. Samples: a:1" in spike.describe()


def test_no_alarm_at_the_beginning_and_from_a_quiet_loss() -> None:
    watch = Watch()
    assert not any(watch.see(100.0 if i == 10 else 1.0, 1.0, []) for i in range(20))
    assert watch.see(1.05, 1.0, []) == []  # the spread is 0


def test_a_resumed_run_judges_as_one_that_was_not_interrupted() -> None:
    losses = np.random.default_rng(1).normal(2, 0.1, 60).tolist()
    whole = Watch()
    for loss in losses:
        whole.see(loss, 1.0, [])
    resumed = Watch(rows(losses))
    assert resumed.see(9.0, 1.0, []) == whole.see(9.0, 1.0, [])
    assert resumed.early(400) == whole.early(400)


def test_early() -> None:
    watch = Watch(rows([float(i) for i in range(1, 31)], norm=2.0))
    early = watch.early(200)
    assert early is not None
    assert (early.steps, early.loss, early.grad_norm) == (10, pytest.approx(5.5), 2.0)
    assert watch.early(10_000) is None
    assert [early_steps(n) for n in (1, 19, 21, 2000, 2001, 10**6)] == [1, 1, 2, 100, 100, 100]
