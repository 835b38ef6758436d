"""linear and the packed product under it: against float64 on every instruction set, gradients, autocast, compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import randn
from torch.nn import functional

from fastsft import _C, info, ops
from fastsft.ops import gemm, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # largest relative, to nearest
SHAPES = [(16, 8, 24), (17, 1, 1), (31, 33, 65), (257, 300, 71), (65, 2049, 130), (16, 5, 0), (20, 0, 9)]  # M, K, N


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every type and size through the packed product, whatever the rule for this CPU."""
    monkeypatch.setattr(gemm, "_NATIVE_TYPES", frozenset(DTYPES))
    monkeypatch.setattr(gemm, "_MIN_ROWS", 0)


def check_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, start: torch.Tensor | None = None) -> None:
    """Within K roundings of float32 on the sum of magnitudes (a sum's worst case), and one of the result's type."""
    a, b = a.double(), b.double()
    exact, size = a @ b, a.abs() @ b.abs()
    if start is not None:
        exact, size = exact + start.double(), size + start.double().abs()
    bound = (a.shape[1] + 2) * ROUNDING[torch.float32] * size + ROUNDING[out.dtype] * exact.abs() * 1.01
    assert out.shape == exact.shape
    assert ((out.double() - exact).abs() <= bound + 1e-7 * (out.dtype == torch.float16)).all()


@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product_on_every_isa(isa: str, dtype: torch.dtype, transposed: tuple[bool, bool]) -> None:
    for m, k, n in [(1, 1, 1), (3, 5, 7), (14, 32, 32), (15, 33, 33), (101, 301, 71), (33, 1025, 257), (5, 0, 4)]:
        a = randn(k, m, dtype=dtype).t() if transposed[0] else randn(m, k, dtype=dtype)
        b = randn(n, k, seed=1, dtype=dtype).t() if transposed[1] else randn(k, n, seed=1, dtype=dtype)
        for out_dtype in {dtype, torch.float32}:
            start = randn(m, n, seed=2, dtype=out_dtype)
            check_product(gemm.product(a, b, torch.full_like(start, torch.nan)), a, b)
            check_product(gemm.product(a, b, start.clone(), accumulate=True), a, b, start)


def test_product_of_mixed_types_and_of_a_window(isa: str) -> None:
    for types in [(torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16), (torch.bfloat16, torch.float32)]:
        a, b = randn(19, 70, dtype=types[0])[:, 3:60], randn(70, 45, seed=1, dtype=types[1])[5:62, 2:40]
        whole = torch.full((21, 50), 7.0)
        check_product(gemm.product(a, b, whole[1:20, 6:44]), a, b)
        whole[1:20, 6:44] = 7
        assert (whole == 7).all()  # nothing around the window was touched


def test_product_keeps_nan_and_infinity_in_their_row(isa: str) -> None:
    a, b = randn(40, 70), randn(70, 50, seed=1)
    a[3, 5], a[9, 0] = torch.nan, torch.inf
    out = gemm.product(a, b, torch.empty(40, 50))
    bad = torch.zeros(40, dtype=torch.bool)
    bad[[3, 9]] = True
    assert torch.equal(~out.isfinite().all(1), bad)
    assert torch.equal(out[~bad], gemm.product(a.nan_to_num(posinf=0), b, torch.empty(40, 50))[~bad])


def test_product_errors() -> None:
    a, b, c = torch.zeros(4, 5), torch.zeros(5, 6), torch.zeros(4, 6)
    for arguments, message in [
        ((a, torch.zeros(6, 6), c), "gemm: b: .*K"),
        ((a, b, torch.zeros(4, 7)), "gemm: c: .*N"),
        ((a.double(), b, c), "gemm: a: expected float32, bfloat16 or float16"),
        ((torch.zeros(4, 10)[:, ::2].expand(4, 5), b, torch.zeros(6, 4).t()), "gemm: a: expected one contiguous"),
        ((a, b, torch.zeros(6, 4).t()), "gemm: c: expected a contiguous last dimension"),
    ]:
        with pytest.raises(ValueError, match=message):
            _C.gemm(*arguments, False)


# --- linear -----------------------------------------------------------------------------------------------------------


def gradients(function: Any, inputs: list[torch.Tensor | None], upstream: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradient of each input."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    given = [leaf for leaf in leaves if leaf is not None]
    return [out.detach(), *torch.autograd.grad(out, given, upstream.to(out.dtype))]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 4, 3), (1, 40, 50)], ids=str)
def test_output_and_gradients(shape: tuple[int, int, int], dtype: torch.dtype, with_bias: bool) -> None:
    """No further from float64 than twice torch in the same type."""
    m, k, n = shape
    inputs = [randn(m, k, dtype=dtype), randn(n, k, seed=1, dtype=dtype), randn(n, seed=2, dtype=dtype)]
    inputs = inputs if with_bias else inputs[:2]
    upstream = randn(m, n, seed=3, dtype=dtype)
    ours = gradients(ops.linear, inputs, upstream)
    torchs = gradients(functional.linear, inputs, upstream)
    exact = gradients(reference.linear, [t.double() for t in inputs], upstream.double())
    size = gradients(reference.linear, [t.double().abs() for t in inputs], upstream.double().abs())
    for got, theirs, want, summed in zip(ours, torchs, exact, size, strict=True):
        assert got.dtype == dtype
        assert got.shape == want.shape
        # torch's few sums may be exact by luck: a rounding of the sum, and one of the result, is always allowed
        small = ROUNDING[torch.float32] * summed + ROUNDING[dtype] * want.abs()
        error, allowed = (got.double() - want).abs(), (theirs.double() - want).abs()
        assert error.norm() <= 2 * allowed.norm() + small.norm()
        assert got.numel() == 0 or error.max() <= 2 * allowed.max() + small.max()


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_only_the_gradients_asked_for(frozen: int) -> None:
    leaves = [randn(20, 7), randn(9, 7, seed=1), randn(9, seed=2)]
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i != frozen)
    ops.linear(*leaves).square().sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [i == frozen for i in range(3)]
    expected = gradients(lambda *t: functional.linear(*t).square().sum(), leaves, torch.ones(()))[1:]
    for leaf, want in zip(leaves, expected, strict=True):
        assert leaf.grad is None or torch.allclose(leaf.grad, want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("lead", [(5,), (), (2, 3, 4), (2, 0, 4)], ids=str)
def test_any_leading_dimensions(lead: tuple[int, ...]) -> None:
    inputs = [randn(*lead, 11), randn(6, 11, seed=1), randn(6, seed=2)]
    if not lead:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gemm, "_MIN_ROWS", 2)  # a vector is never a matrix product
            check = gradients(ops.linear, inputs, randn(*lead, 6, seed=3))
    else:
        check = gradients(ops.linear, inputs, randn(*lead, 6, seed=3))
    expected = gradients(functional.linear, inputs, randn(*lead, 6, seed=3))
    for got, want in zip(check, expected, strict=True):
        assert got.shape == want.shape
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("native")
def test_layouts() -> None:
    """Transposed, strided and expanded inputs, and an expanded gradient."""
    x, weight, bias = randn(18, 10), randn(12, 10, seed=1), randn(12, seed=2)
    upstream = randn(18, 12, seed=3)
    expected = gradients(ops.linear, [x, weight, bias], upstream)

    def strided(t: torch.Tensor) -> torch.Tensor:
        return torch.stack([t, t], dim=-1)[..., 0]

    def transposed(t: torch.Tensor) -> torch.Tensor:
        return t.t().contiguous().t()

    for layout in (strided, transposed):
        got = gradients(ops.linear, [layout(x), layout(weight), strided(bias)], layout(upstream))
        assert all(torch.equal(a, b) for a, b in zip(got[:3], expected[:3], strict=True))
        assert torch.allclose(got[3], expected[3], rtol=1e-5, atol=1e-5)  # torch's sum, in another order
    row = x[:1].expand(18, 10)
    got = gradients(ops.linear, [row, weight], torch.ones(1, 1).expand(18, 12))
    want = gradients(ops.linear, [row.contiguous(), weight], torch.ones(18, 12))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("native")
def test_same_bits_on_every_thread_count(isa: str, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    """And the same as alone: which rows share a call does not change a row."""
    x, weight, bias = randn(130, 700, dtype=dtype), randn(203, 700, seed=1, dtype=dtype), randn(203, dtype=dtype)
    results = []
    for n in (1, 2, 3, 7):
        threads(n)
        results.append(gradients(ops.linear, [x, weight, bias], randn(130, 203, seed=3, dtype=dtype)))
    alone = ops.linear(x[40:41], weight, bias)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert torch.equal(alone, results[0][0][40:41])


@pytest.mark.usefixtures("native")
def test_no_second_derivative() -> None:
    x, weight = randn(20, 5).requires_grad_(), randn(6, 5, seed=1).requires_grad_()
    (d_x,) = torch.autograd.grad(ops.linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d_x.sum().backward()


@pytest.mark.parametrize("rows", [4, 40])  # torch's path, and ours
def test_autocast(rows: int) -> None:
    leaves = [randn(rows, 9), randn(6, 9, seed=1), randn(6, seed=2)]
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            ours = gradients(ops.linear, leaves, randn(rows, 6, seed=3))
            theirs = gradients(functional.linear, leaves, randn(rows, 6, seed=3))
            wide = ops.linear(*(t.double() for t in leaves))
        assert [t.dtype for t in ours] == [dtype, *(t.dtype for t in leaves)]
        for got, want in zip(ours, theirs, strict=True):
            assert torch.allclose(got.float(), want.float(), rtol=4 * ROUNDING[dtype], atol=8 * ROUNDING[dtype])
        assert wide.dtype == torch.float64


@pytest.mark.usefixtures("native")
def test_opcheck_and_compile() -> None:
    x, weight, bias = randn(20, 5), randn(6, 5, seed=1), randn(6, seed=2)
    forward, backward = torch.ops.fastsft.linear.default, torch.ops.fastsft.linear_backward.default
    torch.library.opcheck(forward, (x, weight, None))
    torch.library.opcheck(forward, (x, weight, bias))
    for given in [(x, weight), (None, weight), (x, None)]:
        torch.library.opcheck(backward, (randn(20, 6), *given))
        turned = [t if t is None else t.t().contiguous().t() for t in given]
        torch.library.opcheck(backward, (randn(20, 6), *turned))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = gradients(ops.linear, [x, weight, bias], randn(20, 6, seed=3))
        compiled = torch.compile(ops.linear, fullgraph=True, backend="aot_eager")
        for got, want in zip(gradients(compiled, [x, weight, bias], randn(20, 6, seed=3)), plain, strict=True):
            assert torch.equal(got, want)
    for rows in (20, 20, 33, 34):  # sizes become symbolic
        inputs = [randn(rows, 5), weight, bias]
        plain = gradients(ops.linear, inputs, randn(rows, 6, seed=3))
        for got, want in zip(gradients(compiled, inputs, randn(rows, 6, seed=3)), plain, strict=True):
            assert torch.equal(got, want)


@pytest.mark.usefixtures("native")
def test_fake_tensors() -> None:
    with torch._subclasses.FakeTensorMode():
        x, weight = torch.empty(2, 9, 5, requires_grad=True), torch.empty(6, 5, requires_grad=True)
        out = ops.linear(x, weight)
        assert out.shape == (2, 9, 6)
        assert [g.shape for g in torch.autograd.grad(out.sum(), (x, weight))] == [x.shape, weight.shape]


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (torch.zeros(2, 3).int(), torch.zeros(4, 3), None, r"x: expected floats \[..., K\], got torch.int32 \[2, 3\]"),
        (torch.zeros(()), torch.zeros(4, 3), None, r"x: expected floats"),
        (torch.zeros(2, 3), torch.zeros(4, 5), None, r"weight: expected torch.float32 \[N, 3\], got .* \[4, 5\]"),
        (torch.zeros(2, 3), torch.zeros(3), None, r"weight: expected"),
        (torch.zeros(2, 3), torch.zeros(4, 3).bfloat16(), None, r"weight: .*got torch.bfloat16 \[4, 3\]"),
        (torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(3), r"bias: expected torch.float32 \[4\], got .* \[3\]"),
        (torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(4).half(), r"bias: expected"),
    ],
)
def test_errors(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"^linear: {message}"):
        ops.linear(x, weight, bias)


def test_the_rule_is_what_info_says(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []
    monkeypatch.setattr(gemm, "_Linear", type("Spy", (), {"apply": lambda x, *_: calls.append(x.dtype) or x}))
    row = info()["ops"]["linear"]["cpu"]
    for dtype in [*DTYPES, torch.float64]:
        for rows in (gemm._MIN_ROWS - 1, gemm._MIN_ROWS):
            ops.linear(torch.zeros(rows, 4, dtype=dtype), torch.zeros(4, 4, dtype=dtype))
    served, _, rest = row["reason"].partition("; ")
    assert [str(dtype).removeprefix("torch.") in served for dtype in DTYPES] == [dtype in calls for dtype in DTYPES]
    assert len(calls) == len(set(calls))
    assert row["kind"] == "torch" or f"fewer than {gemm._MIN_ROWS} rows" in rest


@pytest.mark.parametrize(
    ("isas", "served"),
    [
        (["base"], set()),
        (["base", "avx2", "avx512"], {torch.float32, torch.bfloat16}),
        (["base", "avx2", "avx512", "avx512bf16"], {torch.float32}),
    ],
)
def test_the_rule(isas: list[str], served: set[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_C, "available_isas", lambda: isas)
    types, implementation = gemm._choose()
    assert types - {torch.float16} == served
    assert ("oneDNN" in implementation.reason) == ("avx512bf16" in isas)
