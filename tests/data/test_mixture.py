"""Mixtures: shares of sources over the epochs, every sample as often as its weight says, order without replay."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsft.config import ConfigError, DataOptions, SourceOptions, load_config
from fastsft.data.batch import Sample
from fastsft.data.loader import PackedLoader
from fastsft.data.mixture import Mixture, passes
from fastsft.data.prepare import prepare
from fastsft.data.store import SampleStore
from fastsft.models.tokenizer import Tokenizer

SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=4)


def mixture(sizes: list[int], weights: list[Fraction], seed: int) -> Mixture:
    return Mixture(np.repeat(np.arange(len(sizes)), sizes), weights, seed=seed)


@settings(max_examples=100, deadline=None)
@given(SIZES, st.data(), st.integers(0, 2**62), st.integers(0, 7))
def test_every_sample_as_often_as_its_weight_says(
    sizes: list[int], data: st.DataObject, seed: int, epochs: int
) -> None:
    weights = [data.draw(st.fractions(0, 3, max_denominator=6)) for _ in sizes]
    found = mixture(sizes, weights, seed)
    drawn = [found.draw(epoch).tolist() for epoch in range(epochs)]
    counts = Counter(itertools.chain(*drawn))
    first = 0
    for size, weight in zip(sizes, weights, strict=True):
        for epoch, numbers in enumerate(drawn):
            taken = sum(first <= n < first + size for n in numbers)
            assert taken == int((epoch + 1) * weight * size) - int(epoch * weight * size)
        # After k passes and a part of one, every sample was there k or k + 1 times.
        often = [counts[n] for n in range(first, first + size)]
        whole = int(epochs * weight * size) // size if size else 0
        assert set(often) <= {whole, whole + 1}
        first += size
    again = mixture(sizes, weights, seed)
    assert [again.draw(epoch).tolist() for epoch in reversed(range(epochs))][::-1] == drawn


def test_halves_differ_and_complete_each_other() -> None:
    found = mixture([100], [Fraction(1, 2)], 0)
    first, second, third = (set(found.draw(epoch).tolist()) for epoch in range(3))
    assert first | second == set(range(100))
    assert len(first & second) == 0
    assert first != third, "a new pass has a new order"
    assert first != set(mixture([100], [Fraction(1, 2)], 1).draw(0).tolist())
    assert first != set(range(50)), "a random half"
    both = mixture([100, 100], [Fraction(1, 2)] * 2, 0).draw(0)
    assert set(both[:50].tolist()) != {n - 100 for n in both[50:].tolist()}, "sources have orders of their own"


def options(*sources: tuple[float, str], **ratios: float) -> DataOptions:
    listed = [SourceOptions(f"s{i}", ["f"], weight=w, tag=tag) for i, (w, tag) in enumerate(sources)]
    return DataOptions(sources=listed, ratios=ratios)


def test_ratios_scale_down_what_there_is_too_much_of() -> None:
    found = passes(options((1, "reasoning"), (0.5, "other"), (1, "other"), reasoning=5, other=1), [100, 200, 300])
    samples = [w * n for w, n in zip(found, [100, 200, 300], strict=True)]
    assert samples == [100, 5, 15]  # 100 : 20, and 1 : 3 within the tag as the weights have it
    assert passes(options((1, "reasoning"), (1, "other"), reasoning=1, other=1), [10, 40]) == [1, Fraction(1, 4)]
    assert passes(options((0.1, "a"), (2, "b")), [3, 3]) == [Fraction(1, 10), 2]
    with pytest.raises(ConfigError, match=r"data\.ratios: expected a ratio for the tag 'other', got a"):
        passes(options((1, "a"), (1, "other"), a=1), [1, 1])
    with pytest.raises(ConfigError, match=r"data\.ratios: no sample has the tag 'b'"):
        passes(options((1, "a"), (1, "b"), a=1, b=1), [1, 0])


def test_batches_of_a_mixture() -> None:
    store = SampleStore.from_samples(
        Sample(np.full(3, i, np.int32), np.ones(3, np.float32), f"s{i}", int(i >= 8)) for i in range(12)
    )
    weights = [Fraction(1, 4), Fraction(2)]
    loader = PackedLoader(store, capacity=9, seed=3, weights=weights)
    batches = [loader.batch(epoch, i) for epoch in range(4) for i in range(loader.num_batches(epoch))]
    counts = Counter(s for batch in batches for s in batch.sources)
    assert counts == {f"s{i}": 8 if i >= 8 else 1 for i in range(12)}
    assert all(o == int(int(s[1:]) >= 8) for b in batches for s, o in zip(b.sources, b.origins, strict=True))
    later = PackedLoader(store, capacity=9, seed=3, weights=weights).batch(3, 1)
    assert later.sources == loader.batch(3, 1).sources, "no epoch before it is needed"
    none = PackedLoader(store, capacity=9, seed=3, weights=[Fraction(0), Fraction(1, 9)])
    assert [none.num_batches(epoch) for epoch in range(3)] == [0, 0, 1]


def run_of(tmp_path: Path, sources: list[dict[str, Any]], **data: Any) -> Any:
    if not (tmp_path / "tok").exists():
        (tmp_path / "tok").mkdir()
        Tokenizer.train(["alpha beta"] * 9, 300).save(tmp_path / "tok")
    for name, rows in {"a": 12, "b": 30}.items():
        lines = [json.dumps({"text": f"{name} {i}", "body": "x"}) + "\n" for i in range(rows)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return prepare(
        load_config(
            {"output": str(tmp_path / "run"), "tokenizer": {"path": str(tmp_path / "tok")},
             "data": {"sources": sources, "eval_fraction": 0.0, **data}}
        )
    )  # fmt: skip


def test_sources_from_files(tmp_path: Path) -> None:
    a = {"name": "a", "files": [str(tmp_path / "a.jsonl")], "weight": 2, "tag": "reasoning"}
    b = {"name": "b", "files": [str(tmp_path / "b.jsonl")], "fields": {"text": "body"}, "cap": 7}
    found = run_of(tmp_path, [a, b])
    assert [(s["name"], s["samples"]) for s in found.report["sources"]] == [("a", 12), ("b", 7)]
    assert sum(s["tokens"] for s in found.report["sources"]) == found.report["train"]["tokens"]
    assert sum(s["trained_tokens"] for s in found.report["sources"]) == found.report["train"]["trained_tokens"]
    assert found.report["capped"] == 23
    assert found.train.origins.tolist() == [0] * 12 + [1] * 7
    lines = [int(found.train[i].source.rpartition(":")[2]) for i in range(12, 19)]
    assert lines == sorted(lines)
    again = run_of(tmp_path, [{**a, "weight": 0.5}, {**b, "tag": "x"}], ratios={"reasoning": 6, "x": 1})
    assert again.report == found.report, "weights, tags and ratios need no new preparation"
    with pytest.raises(ConfigError, match="expected a ratio for the tag 'other'"):
        run_of(tmp_path, [a, b], ratios={"reasoning": 6})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": ["x"], "sources": [{"name": "a", "files": ["f"]}]}, r"data\.train: expected nothing beside"),
        ({"sources": [{"name": "a", "files": []}]}, r"data\.sources\.0\.files: expected at least one file"),
        ({"sources": [{"name": "a", "files": ["f"], "weight": -1}]}, r"data\.sources\.0\.weight: expected"),
        ({"sources": [{"name": "a", "files": ["f"], "weight": float("inf")}]}, r"data\.sources\.0\.weight: expected"),
        ({"sources": [{"name": "a", "files": ["f"], "cap": 0}]}, r"data\.sources\.0\.cap: expected at least 1"),
        ({"sources": [{"name": "a", "files": ["f"]}] * 2}, r"data\.sources: expected different names"),
        ({"sources": [{"name": "a", "files": ["f"], "wieght": 1}]}, "did you mean 'weight'"),
        ({"sources": [{"name": "a", "files": ["f"], "fields": {"txt": "b"}}]}, r"data\.sources\.0\.fields\.txt'; did"),
        ({"sources": [{"name": "a"}]}, r"data\.sources\.0\.files: Field required"),
        ({"ratios": {"a": 0}}, r"data\.ratios\.a: expected more than 0"),
    ],
)
def test_sources_that_cannot_be_used(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config({"data": data})
