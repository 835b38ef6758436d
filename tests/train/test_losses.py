"""Losses by source and by segment: each is the loss of a batch in which nothing else has a weight."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kill_resume import run_config
from resume_cases import train
from train_cases import model_of, random_samples

from fastsft.config import ObjectiveOptions
from fastsft.data.batch import Sample, collate
from fastsft.data.store import SampleStore
from fastsft.train.evaluate import batch_loss, evaluate_loss
from fastsft.train.losses import SEGMENTS, added, by_group, by_origin, by_segment, means
from fastsft.train.metrics import read_metrics
from fastsft.train.objective import Objective


def samples_of(count: int) -> list[Sample]:
    """Of two sources, with random segments; none is a tool call."""
    rng = np.random.default_rng(2)
    kinds = np.array([0, 1, 2, 4], np.uint8)
    return [
        Sample(s.ids, s.weights, s.source, i % 2, rng.choice(kinds, len(s.ids)))
        for i, s in enumerate(random_samples(count, 3))
    ]


def alone(model: Any, samples: list[Sample], keep: Any) -> tuple[float, float]:
    """Loss and weight where the tokens for which ``keep(sample)`` is false weigh nothing."""
    chosen = collate([Sample(s.ids, np.where(keep(s), s.weights, 0).astype(np.float32)) for s in samples])
    return float(batch_loss(model, chosen, normalizer=1.0)), float(chosen.weights.sum())


@torch.no_grad()
def test_loss_by_source_and_segment() -> None:
    samples = samples_of(8)
    model, objective = model_of(), Objective(ObjectiveOptions(name="dft"))  # whose own weights must not count
    batches = [SampleStore.from_samples(samples[i : i + 4]).batch(np.arange(4)) for i in (0, 4)]
    seen = [(batch, objective(model, batch, divisor=1.0)[1]) for batch in batches]
    sums = by_group(seen)
    assert sums == added([by_group(seen[:1]), by_group(seen[1:])])
    assert by_origin(sums).keys() == {0, 1}
    assert by_segment(sums).keys() == {0, 1, 2, 4}
    for origin, found in by_origin(sums).items():
        assert found == pytest.approx(alone(model, samples, lambda s: s.origin == origin), rel=1e-5)  # noqa: B023
    for segment, found in by_segment(sums).items():
        assert found == pytest.approx(alone(model, samples, lambda s: s.segments == segment), rel=1e-5)  # noqa: B023
    assert means(by_segment(sums), SEGMENTS)["answer"] == sums_mean(by_segment(sums)[2])


def sums_mean(sums: tuple[float, float]) -> float:
    return sums[0] / sums[1]


@torch.no_grad()
def test_held_out_loss_by_source_and_segment() -> None:
    samples, model = samples_of(9), model_of()
    result = evaluate_loss(model, SampleStore.from_samples(samples), capacity=40, sources=["a", "b", "absent"])
    assert result is not None
    assert result.sources.keys() == {"a", "b"}
    assert result.segments.keys() == {"prompt", "thinking", "answer", "control"}
    for name, loss in result.sources.items():
        expected = sums_mean(alone(model, samples, lambda s: "ab"[s.origin] == name))  # noqa: B023
        assert loss == pytest.approx(expected, rel=1e-5)
    for name, loss in result.segments.items():
        expected = sums_mean(alone(model, samples, lambda s: s.segments == SEGMENTS.index(name)))  # noqa: B023
        assert loss == pytest.approx(expected, rel=1e-5)
    assert result.skills == {}
    plain = evaluate_loss(model, SampleStore.from_samples(samples), capacity=40)
    assert plain is not None
    assert plain.sources == {}
    assert plain.loss == result.loss


@torch.no_grad()
def test_held_out_loss_by_skill() -> None:
    model = model_of()
    skills: list[tuple[str, ...]] = [("a",), ("a", "b"), (), ("b", "b"), ("c",)]
    samples = [dataclasses.replace(s, skills=k) for s, k in zip(samples_of(5), skills, strict=True)]
    samples[4].weights[:] = 0
    result = evaluate_loss(model, SampleStore.from_samples(samples), capacity=40)
    assert result is not None
    assert [*result.skills] == ["a", "b"]
    for name, loss in result.skills.items():
        expected = sums_mean(alone(model, samples, lambda s: name in s.skills))  # noqa: B023
        assert loss == pytest.approx(expected, rel=1e-5)


def test_segments_of_a_run(tmp_path: Path) -> None:
    """What a run logs of a segment is the loss of a run in which nothing else has a weight."""
    turns = [
        {"role": "user", "content": "which?"}, {"role": "assistant", "content": "<think>first b</think>the second"},
    ]  # fmt: skip
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"messages": turns, "weight": w}) + "\n" for w in (1, 0.5, 3)))
    logged = {}
    for name in ("", "thinking", "answer", "control"):
        weights = {n: float(n == name) for n in SEGMENTS} if name else {}
        config = run_config(data, tmp_path / f"run{name}", steps=1)
        config["data"] |= {"eval": [str(data)], "weights": weights}
        train(config)
        lines = read_metrics(tmp_path / f"run{name}" / "metrics.jsonl")
        logged[name] = [next(m for m in lines if m["kind"] == kind) for kind in ("eval", "step")]
    for before, whole in enumerate(logged[""]):
        assert whole["segments"].keys() == {"thinking", "answer", "control"}
        for name, loss in whole["segments"].items():
            assert logged[name][before]["loss"] == pytest.approx(loss, rel=1e-4)
            assert logged[name][before]["segments"].keys() == {name}
