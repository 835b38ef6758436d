"""Sampling: the draws of the reference, the distribution by chi-square, transformers' filters, independence of rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastsft import _C, ops
from fastsft.ops import reference, sampling


def parameters(rows: int, **given: Any) -> dict[str, torch.Tensor]:
    """Per-row tensors from numbers or lists."""
    kinds = {
        "temperature": (1.0, torch.float32),
        "top_k": (0, torch.int32),
        "top_p": (1.0, torch.float32),
        "min_p": (0.0, torch.float32),
        "seeds": (0, torch.int64),
        "positions": (0, torch.int64),
    }
    full = {}
    for name, (default, dtype) in kinds.items():
        value = torch.as_tensor(given.pop(name, default), dtype=dtype)
        full[name] = value.expand(rows).contiguous()
    assert not given
    return full


def draws(row: torch.Tensor, count: int, **options: Any) -> torch.Tensor:
    """Many draws from one row, at positions 0, 1, ..."""
    p = parameters(count, **options, positions=torch.arange(count))
    return ops.sample(row.expand(count, -1).contiguous(), **p)[0]


@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 31, 333])
def test_draws_of_the_reference(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    rows = 48
    logits = torch.randn(rows, vocab, generator=generator) * 3
    if vocab > 2:
        logits[torch.rand(rows, vocab, generator=generator) < 0.1] = -math.inf
        logits[:, 0] = 0.5
    p = parameters(
        rows,
        temperature=torch.rand(rows, generator=generator) * (torch.arange(rows) % 5 != 0) * 2,
        top_k=torch.randint(0, 9, (rows,), generator=generator) * (torch.arange(rows) % 3 == 0),
        top_p=torch.where(torch.arange(rows) % 2 == 0, torch.rand(rows, generator=generator) * 0.98 + 0.01, 1.0),
        min_p=torch.where(torch.arange(rows) % 7 == 0, 0.05, 0.0),
        seeds=torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator),
        positions=torch.randint(0, 2**40, (rows,), generator=generator),
    )
    expected_ids, expected_logprobs = reference.sample(logits, **p)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sampling._best, "cuda", sampling.best_tokens)  # Triton's kernel runs in test_triton.py
        found = [ops.sample(logits, **p), sampling._on_device(logits, *p.values())]
    for ids, logprobs in found:
        assert torch.equal(ids, expected_ids)
        assert torch.allclose(logprobs, expected_logprobs, rtol=3e-7, atol=1e-6)
    assert ids.dtype == torch.int64
    assert logprobs.dtype == torch.float32


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_parameters_go_to_a_device_in_one_copy(rows: int) -> None:
    class Copies(TorchDispatchMode):
        """Counts them, and makes them on the CPU."""

        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is not torch.ops.aten._to_copy.default:
                return func(*args, **(kwargs or {}))
            self.count += 1
            return func(*args, **{**kwargs, "device": torch.device("cpu")})

    p = [torch.arange(2 * rows).to(x.dtype)[::2] + i for i, x in enumerate(parameters(0).values())]
    with Copies() as copies:
        moved = sampling._moved(p, torch.device("meta"))
    assert copies.count == 1
    for got, given in zip(moved, p, strict=True):
        assert got.dtype == given.dtype
        assert got.is_contiguous()
        assert torch.equal(got, given)


def test_filters_on_a_device_take_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """And only those with a filter, whatever is beside them."""
    logits = torch.randn(24, 100, generator=torch.Generator().manual_seed(1)) * 3
    rows = torch.arange(24)
    p = parameters(
        24, temperature=(rows % 4).float(), top_k=rows % 2 * 5, top_p=torch.where(rows % 3 == 0, 0.8, 1.0), seeds=rows
    )
    kept_of, taken = sampling.kept_of, list[int]()

    def noting(scores: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        taken.append(len(scores))
        return kept_of(scores, *others)

    monkeypatch.setitem(sampling._best, "cuda", sampling.best_tokens)
    monkeypatch.setattr(sampling, "_SORTED", 512)
    monkeypatch.setattr(sampling, "kept_of", noting)
    ids, _ = sampling._on_device(logits, *p.values())
    assert torch.equal(ids, reference.sample(logits, **p)[0])
    filtered = int(((rows % 4 > 0) & ((rows % 2 > 0) | (rows % 3 == 0))).sum())
    assert sum(taken) == filtered
    assert taken == [5] * (filtered // 5) + [filtered % 5] * (filtered % 5 > 0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 3.0},
        {"top_k": 4},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"top_k": 6, "top_p": 0.8, "min_p": 0.1, "temperature": 1.5},
    ],
)
def test_distribution(options: dict[str, float]) -> None:
    """Chi-square of 40,000 draws against the filtered softmax: below its mean + 4 standard deviations."""
    count = 40_000
    row = torch.tensor([0.3, 2.0, 1.1, -0.5, 1.9, -math.inf, 0.0, 1.3, 2.2, -1.0])
    found = torch.bincount(draws(row, count, seeds=99, **options), minlength=len(row)).double()
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    kept = reference.kept_tokens(row, **full)
    probability = torch.softmax((row.double() / full["temperature"]).masked_fill(~kept, -math.inf), 0)
    assert found[~kept].sum() == 0
    expected = count * probability[kept]
    chi = float(((found[kept] - expected) ** 2 / expected).sum())
    freedom = int(kept.sum()) - 1
    assert freedom >= 2
    assert chi < freedom + 4 * math.sqrt(2 * freedom)


def test_rare_tokens_are_drawn_as_often_as_they_should() -> None:
    """The upper tail of the noise: 2,000 tokens that together have 1 %, each far below the resolution of 16 bits."""
    count, rare = 20_000, 2000
    row = torch.full((rare + 1,), math.log(0.01 / rare))
    row[0] = math.log(0.99)
    found = int((draws(row, count, seeds=5) > 0).sum())
    assert abs(found - 0.01 * count) < 4 * math.sqrt(count * 0.01 * 0.99)


def test_filters_keep_what_transformers_keeps() -> None:
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(20, 200, generator=torch.Generator().manual_seed(0)) * 2
    for row in logits:
        for k, p, m in [(7, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.05), (30, 0.9, 0.02)]:
            scores = row[None] / 0.8
            if k:
                scores = logits_process.TopKLogitsWarper(k)(None, scores)
            if p < 1:
                scores = logits_process.TopPLogitsWarper(p)(None, scores)
            if m:
                scores = logits_process.MinPLogitsWarper(m)(None, scores)
            theirs = scores[0] > -math.inf
            assert torch.equal(reference.kept_tokens(row, 0.8, k, p, m), theirs)
            ids = draws(row, 400, temperature=0.8, top_k=k, top_p=p, min_p=m)
            assert theirs[ids].all()


@pytest.mark.parametrize(
    "options", [{"top_k": 500}, {"top_p": 0.97}, {"top_p": 0.999999}, {"top_k": 3000, "top_p": 0.5}]
)
def test_filters_on_a_flat_row(options: dict[str, float]) -> None:
    """Survivors lie deeper than the first look below the maximum."""
    row = torch.randn(3001, generator=torch.Generator().manual_seed(4)) * 0.3
    row[5] = 9.0
    full = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    kept = reference.kept_tokens(row, **full)
    ids = draws(row, 3000, **full)
    assert kept[ids].all()
    assert len(ids.unique()) > 0.1 * int(kept.sum())


def test_greedy_and_ties() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 2.0], [-math.inf, -math.inf, -3.0, -math.inf]])
    ids, logprobs = ops.sample(logits, **parameters(2, temperature=0.0, seeds=3))
    assert ids.tolist() == [1, 2]
    assert torch.allclose(logprobs, torch.log_softmax(logits, -1)[[0, 1], ids])
    ties = draws(torch.tensor([1.0, 5.0, 5.0]), 200, top_k=1)
    assert set(ties.tolist()) == {1, 2}  # what ties with the k-th stays


def test_rows_are_independent_of_the_batch() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(30, 257, generator=generator)
    p = parameters(30, seeds=torch.arange(30), positions=torch.arange(30) * 7, top_p=0.95)
    ids, logprobs = ops.sample(logits, **p)
    for r in (0, 11, 29):
        alone = ops.sample(logits[r : r + 1], **{name: x[r : r + 1] for name, x in p.items()})
        assert (alone[0].item(), alone[1].item()) == (ids[r].item(), logprobs[r].item())
    same = ops.sample(logits[3].expand(40, -1), **parameters(40, seeds=8, positions=torch.arange(40) // 2))[0]
    assert torch.equal(same[0::2], same[1::2])
    assert len(same.unique()) > 5


def test_same_bits_on_every_isa_and_thread_count() -> None:
    logits = torch.randn(9, 4099, generator=torch.Generator().manual_seed(2)) * 2
    p = parameters(9, temperature=[0.0, 0.5, 1.0, 1.5, 1.0, 1.0, 1.0, 0.7, 1.0], top_k=[0] * 4 + [50, 0, 0, 20, 0])
    p["top_p"] = torch.tensor([1.0] * 5 + [0.9, 1.0, 0.8, 0.99])
    p["min_p"] = torch.tensor([0.0] * 6 + [0.01, 0.02, 0.0])
    results = []
    for name in _C.available_isas():
        for n in (1, 3):
            _C.set_isa(name)
            _C.set_num_threads(n)
            for position in range(20):
                p["positions"] = torch.full((9,), position)
                ids, logprobs = ops.sample(logits, **p)
                results.append((position, tuple(ids.tolist()), tuple(logprobs.tolist())))
    assert len(set(results)) == 20


def test_few_rows_in_plain_numbers() -> None:
    logits = torch.randn(40, 333, generator=torch.Generator().manual_seed(5)) * 3
    own = {
        "temperature": [0.0, 0.5, 1.5, 1.0], "top_k": [0, 7, 0, 30], "top_p": [1.0, 0.9, 0.8, 0.95],
        "min_p": [0.0, 0.01, 0.0, 0.1], "seeds": [0, -(2**63), 2**63 - 1, 9],
    }  # fmt: skip
    p = parameters(40, **{name: each * 10 for name, each in own.items()}, positions=torch.arange(40) // 3)
    ids, logprobs = sampling.sample_few(logits, list(zip(*(x.tolist() for x in p.values()), strict=True)))
    for mine, its in zip((ids, logprobs), ops.sample(logits, **p), strict=True):
        assert mine == its.tolist()
    assert sampling.sample_few(torch.empty(0, 5), []) == ([], [])
    with pytest.raises(ValueError, match="sample: rows: expected one for each of the logits, got 2"):
        sampling.sample_few(logits, [(0.0, 0, 1.0, 0.0, 0, 0)] * 2)
    with pytest.raises(ValueError, match=r"min_p: expected a number in \[0, 1\] at row 0, got 2"):
        sampling.sample_few(logits[:1], [(0.0, 0, 1.0, 2.0, 0, 0)])


def test_opcheck_and_compile() -> None:
    logits = torch.randn(3, 50)
    p = parameters(3, positions=torch.arange(3))
    torch.library.opcheck(torch.ops.fastsft.sample.default, (logits, *p.values()))
    compiled = torch.compile(lambda x, q: ops.sample(x * 2, **q), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(logits, p), ops.sample(logits * 2, **p), strict=True):
        assert torch.equal(a, b)


def test_layouts() -> None:
    logits = torch.randn(50, 6).T
    p = parameters(6, seeds=1)
    assert torch.equal(ops.sample(logits, **p)[0], ops.sample(logits.contiguous(), **p)[0])
    assert ops.sample(torch.empty(0, 5), **parameters(0))[0].shape == (0,)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ([0.0, math.nan], {}, "got NaN or \\+inf in row 2"),
        ([0.0, math.inf], {}, "got NaN or \\+inf in row 2"),
        ([-math.inf, -math.inf], {}, "expected a token that is not -inf, got none in row 2"),
        ([0.0, 1.0], {"temperature": -1.0}, "temperature: expected a finite number >= 0 at row 0, got -1"),
        ([0.0, 1.0], {"temperature": math.nan}, "temperature: expected a finite"),
        ([0.0, 1.0], {"top_k": -2}, "top_k: expected an integer >= 0 at row 0, got -2"),
        ([0.0, 1.0], {"top_p": 0.0}, r"top_p: expected a number in \(0, 1\] at row 0, got 0"),
        ([0.0, 1.0], {"min_p": [0.0, 0.0, 1.5, 0.0]}, r"min_p: expected a number in \[0, 1\] at row 2, got 1.5"),
    ],
)
def test_errors(row: list[float], options: dict[str, Any], message: str) -> None:
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0], row, [math.nan, 0.0] if "row 2" in message else [0.0, 0.0]])
    with pytest.raises(ValueError, match=message):
        ops.sample(logits, **parameters(4, **options))


def test_wrong_types() -> None:
    with pytest.raises(ValueError, match="logits: expected contiguous float32"):
        ops.sample(torch.zeros(2, 3, dtype=torch.float64), **parameters(2))
    with pytest.raises(ValueError, match="seeds"):
        ops.sample(torch.zeros(2, 3), **(parameters(2) | {"seeds": torch.zeros(3, dtype=torch.int64)}))
