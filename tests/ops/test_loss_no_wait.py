"""linear_cross_entropy where nothing may be read back from the device, as on a GPU with a bound of the tokens kept or
in a CUDA graph: run here on the CPU, all but the kernels themselves; and on a GPU, where there is one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accuracy import assert_as_good_as_torch
from loss_cases import CASES, IDS, SHAPES, Case, assert_rounded_once, ours, plain, positive, record_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from fastsft import ops
from fastsft.ops import _loss_plan, _loss_products, _loss_tiles, loss, reference

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense, aten.nonzero, aten.bincount, aten.is_nonzero, aten.masked_select, aten.equal,
    aten.unique_consecutive, aten._unique2, aten.unique_dim, aten.unique_dim_consecutive, aten.repeat_interleave,
    aten.lift_fresh, aten.histc,
}  # fmt: skip


class NoWaiting(TorchDispatchMode):
    """Refuses what would wait for a device: reads, results of unknown size, tensors made from Python's numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        indices = args[1] if packet in (aten.index, aten.index_put, aten.index_put_) else ()
        masked = any(i is not None and i.dtype == torch.bool for i in indices)
        if packet in WAITS or masked:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def wide(whole: Any, a: Any, b: Any, dtype: Any, *, beta: float = 1, alpha: float = 1, out: Any) -> Any:
    """baddbmm.dtype_out, which torch has on CUDA only."""
    assert out is whole
    assert (alpha, b.dtype, out.dtype) == (1, a.dtype, dtype)
    sums = torch.bmm(a.float(), b.float())
    return out.copy_(sums if beta == 0 else out + sums)


@contextlib.contextmanager
def device_rules() -> Iterator[None]:
    with torch.library._scoped_library("aten", "IMPL") as library, pytest.MonkeyPatch.context() as patch:
        library.impl("baddbmm.dtype_out", wide, "CPU")
        patch.setattr(_loss_products, "multiply", _loss_products.multiply_cuda)
        patch.setattr(_loss_tiles, "_bound", lambda like, bound: like.shape[0] if bound is None else bound)
        patch.setattr(_loss_tiles, "_check_on_host", lambda *_: None)
        patch.setattr(loss, "_is_one", lambda _: False)
        patch.setattr(loss, "_op", _loss_tiles._run)  # a dispatch mode does not see into an op
        with NoWaiting():
            yield


def small_tiles(monkeypatch: pytest.MonkeyPatch, vocab: int, rows: int, itemsize: int = 4) -> None:
    monkeypatch.setattr(_loss_plan, "FAST_BYTES", _loss_plan.padded(vocab) * itemsize * rows)
    monkeypatch.setattr(_loss_plan, "LEAN_BYTES", 64 * itemsize * rows)
    monkeypatch.setattr(_loss_plan, "_LEAN_COLUMNS", 64)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: bool((x > 0).all()),
        lambda x: x.long().unique(),
        lambda x: x.new_tensor([1.0]),
    ],
)
def test_the_guard_sees(wait: Any) -> None:
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        wait(torch.ones(3))


@pytest.mark.parametrize(("objective", "args"), CASES, ids=IDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1000, 7])
@pytest.mark.parametrize("lean", [False, True])
def test_every_objective(
    lean: bool,
    rows: int,
    shape: tuple[int, int, int],
    objective: str,
    args: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All in one tile, and sequences that end in other tiles than they begin in. What is left out is NaN."""
    case = Case(*shape, positive=positive(objective, args))
    case.targets[-1:] = -100  # what empty rows are made of
    results = [plain(case, dtype, objective, args) for dtype in (torch.float32, torch.float64)]
    small_tiles(monkeypatch, shape[2], rows)
    out = ~case.kept()
    case.hidden[out] = case.ref[out] = case.ref_head[0][out] = torch.nan
    kept = int((~out).sum())
    for bound in (None, kept, kept + 1):
        with device_rules():
            got = ours(case, objective, args, max_kept=bound, lean=lean)
        assert_as_good_as_torch(got, *results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("rows", [1000, 60])
def test_low_precision(rows: int, lean: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, 1031, rows, 2)
    case = Case(257, 64, 1031, dtype)
    results = [plain(case, kind) for kind in (dtype, torch.float64)]
    with device_rules():
        got = ours(case, lean=lean)
    assert_as_good_as_torch(got, *results)


@pytest.mark.skipif(
    not _loss_products.HAS_WIDE_RESULTS, reason="torch before 2.8 has no 16-bit products with a float32 result on CUDA"
)
@pytest.mark.parametrize("lean", [False, True])
def test_gradients_are_rounded_once(lean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, 131, 60, 2)
    case = Case(257, 19, 131, torch.bfloat16)
    recorded = record_gradients(monkeypatch, case)
    with device_rules():
        got = ours(case, lean=lean)
    assert_rounded_once(case, got, *recorded)


@pytest.mark.parametrize("lean", [False, True])
def test_products_without_wide_results(lean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch before 2.8: each tile's share of a sum is rounded."""
    small_tiles(monkeypatch, 131, 60, 2)
    monkeypatch.setattr(_loss_products, "HAS_WIDE_RESULTS", False)
    case = Case(257, 19, 131, torch.bfloat16)
    hidden, weight = record_gradients(monkeypatch, case)
    with device_rules():
        got = ours(case, lean=lean)
    count = int(case.kept().sum())
    assert (got[1][case.kept()].double() - hidden[:count]).norm() <= 2**-7 * hidden.norm()
    assert (got[2].double() - weight).norm() <= 2**-7 * weight.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("rows", [1000, 60])
def test_accumulate_into(rows: int, lean: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, 131, rows, dtype.itemsize)
    case, into = Case(257, 19, 131, dtype), torch.ones(131, 19)
    exact = plain(case, torch.float64)[2]
    with device_rules():
        ours(case, accumulate_into=into, lean=lean)
    rounding = 3 * 2**-24 * into.numel() ** 0.5
    assert (into.double() - 1 - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm() + rounding


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("normalizer", [None, 3.0, torch.tensor(3.0)])
def test_reductions(reduction: str, normalizer: Any) -> None:
    case = Case(31, 24, 257)
    kw: dict[str, Any] = {"reduction": reduction, "upstream": -2.5, "label_smoothing": 0.1}
    if reduction == "mean":
        kw["normalizer"] = normalizer
    results = [plain(case, dtype, **kw) for dtype in (torch.float32, torch.float64)]
    with device_rules():
        got = ours(case, **kw)
    assert_as_good_as_torch(got, *results)


@pytest.mark.parametrize("lean", [False, True])
def test_logprobs_and_entropy(lean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, 257, 7)
    case = Case(31, 24, 257)
    up = torch.randn(2, 31, generator=torch.Generator().manual_seed(1))
    leaves = [t.double().requires_grad_() for t in (case.hidden, case.weight)]
    exact = reference.linear_logprobs(*leaves, case.targets, softcap=5.0)
    (exact[0] * up[0] + exact[1] * up[1]).sum().backward()
    mine = [t.clone().requires_grad_() for t in (case.hidden, case.weight)]
    with device_rules():
        got = ops.linear_logprobs(*mine, case.targets, softcap=5.0, return_entropy=True, lean=lean, max_kept=25)
        (got[0] * up[0] + got[1] * up[1]).sum().backward()
    for a, b in zip((*got, *[x.grad for x in mine]), (*exact, *[x.grad for x in leaves]), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)  # type: ignore[union-attr]


def test_more_tokens_than_the_bound_are_seen() -> None:
    case = Case(31, 24, 257)
    kept = int(case.kept().sum())
    with device_rules():
        loss_, d_hidden, *_ = ours(case, max_kept=kept - 1)
    assert loss_.isnan()
    assert d_hidden.isnan().any()
    with pytest.raises(ValueError, match=f"max_kept: expected at least {kept}, the tokens with weight, got {kept - 1}"):
        ours(case, max_kept=kept - 1)


@pytest.mark.parametrize("bound", [None, 0, 5])
def test_all_weights_zero(bound: int | None) -> None:
    case = Case(9, 6, 11)
    case.weights.zero_()
    with device_rules():
        got = ours(case, max_kept=bound)
    for result in got:
        assert torch.equal(result, torch.zeros_like(result))


def test_an_empty_row_adds_nothing_where_its_stand_in_is_impossible() -> None:
    """Empty rows take class 0; here a bias excludes it."""
    case = Case(31, 24, 257)
    case.targets[case.targets == 0] = 1
    case.bias[0] = -torch.inf
    expected = ours(case, "k3")
    with device_rules():
        got = ours(case, "k3")
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("objective", ["pear_token", "iw_sequence"])
def test_empty_rows_are_no_part_of_what_lies_behind_the_last_sequence(objective: str) -> None:
    case = Case(31, 24, 257)
    case.cu_seqlens = torch.tensor([0, 9, 20], dtype=torch.int32)
    expected = ours(case, objective, {"delta_min": -5.0} if objective == "pear_token" else {})
    with device_rules():
        got = ours(case, objective, {"delta_min": -5.0} if objective == "pear_token" else {})
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def moved(case: Case) -> Case:
    for name, value in vars(case).items():
        setattr(case, name, tuple(t.cuda() for t in value) if isinstance(value, tuple) else value.cuda())
    return case


@pytest.mark.gpu
@pytest.mark.parametrize(("objective", "args"), CASES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("rows", [1000, 60])
def test_gpu_every_objective(
    rows: int, lean: bool, dtype: torch.dtype, objective: str, args: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_tiles(monkeypatch, 1031, rows, dtype.itemsize)
    case = moved(Case(257, 64, 1031, dtype, positive=positive(objective, args)))
    results = [plain(case, kind, objective, args) for kind in (dtype, torch.float64)]
    kept = int(case.kept().sum())
    assert_as_good_as_torch(ours(case, objective, args, lean=lean), *results)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = ours(case, objective, args, lean=lean, max_kept=kept + 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_as_good_as_torch(got, *results)


@pytest.mark.gpu
@pytest.mark.parametrize("objective", ["nll", "pear_token", "iw_sequence"])
@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("bound", [None, 250])
def test_gpu_graph(bound: int | None, lean: bool, objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured once, replayed on other tokens with other masks."""
    small_tiles(monkeypatch, 1031, 60, 2)
    static = moved(Case(257, 64, 1031, torch.bfloat16))
    leaves = [t.clone().requires_grad_() for t in (static.hidden, static.weight)]

    def step() -> tuple[torch.Tensor, ...]:
        value = ops.linear_cross_entropy(*leaves, static.targets, static.weights, objective=objective, lean=lean,
                                         max_kept=bound, **static.inputs(objective, {}))  # fmt: skip
        return (value, *torch.autograd.grad(value, leaves))  # type: ignore[arg-type]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        other = moved(Case(257, 64, 1031, torch.bfloat16, seed))
        with torch.no_grad():
            for mine, given in zip((*leaves, static.targets, static.weights, static.ref, static.cu_seqlens),
                                   (other.hidden, other.weight, other.targets, other.weights, other.ref,
                                    other.cu_seqlens), strict=True):  # fmt: skip
                mine.copy_(given)
        graph.replay()
        other.bias.zero_()
        results = [plain(other, dtype, objective)[:3] for dtype in (torch.bfloat16, torch.float64)]
        assert_as_good_as_torch(captured, *results)
