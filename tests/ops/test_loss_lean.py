"""linear_cross_entropy block by block of the vocabulary: against the plain formulas, and its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import (
    CASES,
    IDS,
    SHAPES,
    Case,
    assert_rounded_once,
    check,
    ours,
    plain,
    positive,
    record_gradients,
    small_blocks,
)

from fastsft import ops
from fastsft.ops import _loss_plan


@pytest.mark.parametrize(("objective", "args"), CASES, ids=IDS)
@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize(("columns", "tiles"), [(8, 1), (50, 1), (64, 5)])
def test_every_objective(
    columns: int,
    tiles: int,
    shape: tuple[int, int, int],
    objective: str,
    args: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case(*shape, positive=positive(objective, args))
    small_blocks(monkeypatch, case, columns, tiles, heads=2 if objective == "asft" else 1)
    # On 257 tokens a summed ratio of the capped logits to the uncapped reference leaves float32.
    options = {"softcap": 4.0, "temperature": 1.3, "z_loss": 0.01} if shape[0] < 257 else {}
    check(case, objective, args, lean=True, **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_label_smoothing_and_reduction(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(31, 24, 257)
    small_blocks(monkeypatch, case, 50, 1)
    check(case, lean=True, label_smoothing=0.1, reduction=reduction, upstream=-2.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tiles", [1, 4])
def test_low_precision(tiles: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(257, 64, 1031, dtype)
    small_blocks(monkeypatch, case, 128, tiles)
    check(case, lean=True)


@pytest.mark.parametrize("tiles", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accumulate_into(dtype: torch.dtype, tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(257, 19, 131, dtype)
    small_blocks(monkeypatch, case, 64, tiles)
    into = torch.ones(131, 19)
    weight = case.weight.clone().requires_grad_()
    ops.linear_cross_entropy(case.hidden, weight, case.targets, case.weights, bias=case.bias, accumulate_into=into,
                             lean=True)  # fmt: skip
    exact = plain(case, torch.float64)[2]
    error = (into.double() - 1 - exact).norm()
    assert error <= 4 * torch.finfo(dtype).eps * exact.norm() + 3 * 2**-24 * into.numel() ** 0.5


@pytest.mark.parametrize("tiles", [1, 4])
def test_gradients_are_rounded_once(tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(257, 19, 131, torch.bfloat16)
    small_blocks(monkeypatch, case, 16, tiles)
    recorded = record_gradients(monkeypatch, case)
    assert_rounded_once(case, ours(case, lean=True), *recorded)


def test_a_class_that_the_bias_excludes_has_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole block of them, and the divergence from a reference."""
    case = Case(31, 24, 257)
    case.bias[64:200] = -torch.inf
    case.targets[case.targets >= 64] = 7
    for objective in ("nll", "entropy_gate", "asft"):
        small_blocks(monkeypatch, case, 64, 1, heads=2 if objective == "asft" else 1)
        lean, fast = ours(case, objective, lean=True), ours(case, objective)
        for a, b in zip(lean, fast, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)
        assert all(x.isfinite().all() for x in lean)


def test_a_nan_row_stays_in_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(31, 24, 257)
    case.targets.clamp_(min=0)
    case.weights.fill_(1.0)
    small_blocks(monkeypatch, case, 64, 1)
    clean = ours(case, "nll", {}, reduction="none", lean=True)
    case.hidden[4] = torch.nan
    dirty = ours(case, "nll", {}, reduction="none", lean=True)
    rows = torch.arange(31) != 4
    for k in (0, 1):
        assert torch.equal(dirty[k][rows], clean[k][rows])
        assert dirty[k][4].isnan().all()


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("width", [896, 8192])
@pytest.mark.parametrize("vocab", [131, 32_768, 151_936])
@pytest.mark.parametrize("count", [0, 1, 511, 16_384, 262_144])
def test_the_plan_covers_everything_within_its_memory(count: int, vocab: int, width: int, itemsize: int) -> None:
    plan = _loss_plan.lean(count, vocab, itemsize, width)
    assert [c for begin, end in plan.columns for c in (begin, end)][1:-1:2] == [begin for begin, _ in plan.columns[1:]]
    assert (plan.columns[0][0], plan.columns[-1][1]) == (0, vocab)
    assert sorted(i for begin, end in plan.rows for i in range(begin, end)) == list(range(count))
    block = max(end - begin for begin, end in plan.columns) * width * 4 if len(plan.rows) > 1 else 0
    assert plan.tile * itemsize + block <= 64 << 20


def test_memory() -> None:
    """Beyond the gradients and the float32 sum of hidden's: the tile; none of it the size of a row chunk's logits."""
    from torch.profiler import ProfilerActivity, profile

    hidden = torch.randn(512, 16, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(151_936, 16, dtype=torch.bfloat16, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        ops.linear_cross_entropy(hidden, weight, torch.zeros(512, dtype=torch.int64), lean=True).backward()
    assert max(e.cpu_memory_usage for e in record.events()) <= 64 << 20
