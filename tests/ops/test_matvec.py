"""pack_weight and packed_linear: the quantisers against their formula, the product against float64, bits of rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from accuracy import assert_as_good_as_torch
from samples import randn

from fastsft import _C, ops
from fastsft.ops import matvec, reference

FORMATS = list(matvec.FORMATS)
INPUTS = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (7, 5), (16, 32), (65, 130), (200, 1030), (128, 512)]  # N, K


# --- packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("format", FORMATS)
def test_packed_weights_stand_for_what_the_formula_says(format: str, group: int, dtype: torch.dtype) -> None:
    for n, k in [*SHAPES, (3, 0), (0, 3)]:
        weight = randn(n, k, dtype=dtype)
        weight[n // 2 :: 9] = 0  # a channel of zeros has scale 0
        expected = reference.pack_weight(weight, format, group=group) if n * k else torch.zeros(n, k)
        assert torch.equal(ops.pack_weight(weight, format, group=group).dequantize(), expected), (n, k)


@pytest.mark.parametrize("format", FORMATS)
def test_strided_weights_and_several_parts(isa: str, format: str) -> None:
    for n, k in SHAPES:
        weight = randn(k, n).t()
        whole = ops.pack_weight(weight, format)
        wide = torch.cat([randn(n, 3, seed=5), weight], 1)[:, 3:]  # rows further apart
        cuts = [0, n // 3, n // 3, n]
        parts = ops.pack_weight([wide[a:b] for a, b in itertools.pairwise(cuts)], format)
        into = ops.pack_weight(randn(n, k, seed=6), format)
        assert ops.pack_weight([weight], format, out=into) is into
        for other in (parts, into):
            assert torch.equal(whole.data, other.data)
            assert torch.equal(whole.scales, other.scales)


def test_a_packed_weight_is_a_copy_and_takes_no_gradient() -> None:
    weight = randn(20, 40).requires_grad_()
    packed = ops.pack_weight(weight, "float32")
    with torch.no_grad():
        weight.zero_()
    assert not packed.data.requires_grad
    assert torch.equal(packed.dequantize(), randn(20, 40))


def test_sizes_and_errors_are_as_documented() -> None:
    weight = randn(1024, 1024)
    for format, group, bits, error in [
        ("float32", 32, 32, 0), ("bfloat16", 32, 16, 0.00166), ("int8", 32, 8, 0.0079),
        ("int4", 32, 4.5, 0.086), ("int4", 64, 4.25, 0.095),
    ]:  # fmt: skip
        packed = ops.pack_weight(weight, format, group=group)
        scales = 1024 * 4 if format == "int8" else 0
        assert packed.nbytes == weight.numel() * bits / 8 + scales
        relative = (packed.dequantize() - weight).norm() / weight.norm()
        assert relative == pytest.approx(error, rel=0.02)


def test_int4_extremes() -> None:
    """The largest magnitude becomes -8 whatever its sign; the opposite extreme is clamped to 7."""
    row = torch.linspace(-1, 1, 32)
    for sign in (1, -1):
        weight = (row * sign)[None]
        weight[0, 0] *= 1.5
        packed = ops.pack_weight(weight, "int4")
        values = torch.empty(1, 32, dtype=torch.int8)
        _C.unpack_weight("int4", packed.data, values)
        assert (values[0, 0], values.max(), values.min()) == (-8, 5, -8)
    symmetric = torch.cat([row, -row])[None]
    values = torch.empty(1, 64, dtype=torch.int8)
    _C.unpack_weight("int4", ops.pack_weight(symmetric, "int4").data, values)
    assert (values.min(), values.max()) == (-8, 7)


# --- the product ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", INPUTS, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_against_float64_on_the_dequantised_weight(isa: str, format: str, dtype: torch.dtype) -> None:
    for n, k in SHAPES:
        for group in (32, 64) if format == "int4" else (32,):
            packed = ops.pack_weight(randn(n, k), format, group=group)
            weight, x, bias = packed.dequantize(), randn(19, k, seed=1, dtype=dtype), randn(n, seed=2)
            taken = reference.round_to_int8(x) if format == "w8a8" else x.double()
            for b in (None, bias):
                exact = reference.packed_linear(taken, weight, None if b is None else b.double())
                theirs = reference.packed_linear(taken.float(), weight, b).to(dtype)
                for rows in (1, 2, 3, 5, 19):
                    got = ops.packed_linear(x[:rows], packed, b)
                    assert got.dtype == dtype
                    assert_as_good_as_torch([got], [theirs[:rows]], [exact[:rows]])


@pytest.mark.parametrize("dtype", INPUTS, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_the_bits_of_a_row_are_its_own(isa: str, format: str, dtype: torch.dtype) -> None:
    """Whatever the number of rows, their order and their contents, and whichever panels of a slab exist."""
    for n, k in [(7, 5), (65, 130), (200, 1030), (48, 64)]:
        packed = ops.pack_weight(randn(n, k), format)
        x = randn(64, k, seed=1, dtype=dtype)
        alone = torch.cat([ops.packed_linear(row[None], packed) for row in x])
        for rows in (*range(1, 18), 24, 37, 64):
            assert torch.equal(ops.packed_linear(x[:rows], packed), alone[:rows]), (n, k, rows)
        assert torch.equal(ops.packed_linear(x.flip(0), packed).flip(0), alone)
        dirty = x.clone()
        dirty[3], dirty[20, 0] = torch.nan, torch.inf
        out, clean = ops.packed_linear(dirty, packed), torch.ones(64, dtype=torch.bool)
        clean[[3, 20]] = False
        assert out[3].isnan().all()
        if format == "w8a8":
            assert out[20].isnan().all()
        else:
            assert not out[20].isfinite().any() or (packed.dequantize()[:, 0] == 0).any()
        assert torch.equal(out[clean], alone[clean])
        wider = ops.pack_weight(randn(n + 130, k, seed=5).index_copy(0, torch.arange(n), randn(n, k)), format)
        assert torch.equal(ops.packed_linear(x, wider)[:, :n], alone)


@pytest.mark.parametrize("dtype", INPUTS, ids=str)
def test_w8a8_rounds_x_as_the_formula_says(isa: str, dtype: torch.dtype) -> None:
    """Seen through 127 times the identity, whose integers are exact: what is rounded is the product with a scale."""
    k = 300
    x = randn(6, k, seed=1, dtype=dtype)
    x[0, :128], x[1, 128] = 0, 1e4  # a run of zeros; one that an outlier rules
    x[2, 128:256] = torch.linspace(-127, 127, 128).round() / 2  # ties
    x[3] *= 1e-37  # its scales are the smallest
    x[4, 256:] = torch.tensor([127.0, *[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5] * 6, 0.25])
    packed = ops.pack_weight(127 * torch.eye(k), "w8a8")
    assert torch.equal(packed.scales.flatten()[:k], torch.ones(k))
    assert torch.equal(ops.packed_linear(x, packed), (reference.round_to_int8(x) * 127).float().to(dtype))


def test_w8a8_has_the_same_bits_on_every_isa_with_fused_products() -> None:
    packed = ops.pack_weight(randn(70, 1000), "w8a8")
    results = []
    for isa in set(_C.available_isas()) - {"base"}:
        _C.set_isa(isa)
        results.append(ops.packed_linear(randn(9, 1000, seed=1), packed))
    assert all(torch.equal(other, results[0]) for other in results[1:])


def test_w8a8_errs_as_little_as_documented() -> None:
    weight, x = randn(512, 4096), randn(16, 4096, seed=1)
    exact = x.double() @ weight.double().T
    errors = {f: (ops.packed_linear(x, ops.pack_weight(weight, f)) - exact).norm() / exact.norm() for f in FORMATS}
    assert errors["w8a8"] < 0.0115  # 0.87 % of the weight and 0.65 % of x, in quadrature
    assert errors["int8"] < errors["w8a8"]


@pytest.mark.parametrize("format", ["float32", "bfloat16"])
def test_a_nan_in_the_weight_stays_in_its_channel(isa: str, format: str) -> None:
    weight = randn(40, 70)
    clean = ops.packed_linear(randn(3, 70, seed=1), ops.pack_weight(weight, format))
    weight[9, 5] = torch.nan
    out = ops.packed_linear(randn(3, 70, seed=1), ops.pack_weight(weight, format))
    assert out[:, 9].isnan().all()
    keep = torch.arange(40) != 9
    assert torch.equal(out[:, keep], clean[:, keep])


@pytest.mark.parametrize("format", FORMATS)
def test_threads_do_not_change_the_bits(format: str, threads: Callable[[int], None]) -> None:
    threads(1)
    packed, x = ops.pack_weight(randn(1100, 520), format), randn(5, 520, seed=1)
    first = ops.packed_linear(x, packed)
    for n in (2, 3, 4):
        threads(n)
        assert torch.equal(ops.packed_linear(x, packed), first)
        assert torch.equal(ops.pack_weight(randn(1100, 520), format).data, packed.data)


@pytest.mark.parametrize("columns", [64, 320, 384, 1000, 4100])
def test_every_column_is_computed_however_many_threads_share_them(columns: int, threads: Callable[[int], None]) -> None:
    weight = randn(columns, 96)
    packed = ops.pack_weight(weight, "float32")
    for count in (1, 2, 3, 5, 17):
        threads(count)
        x = randn(20, 96) * count  # other products each time: memory that was not written must not look right
        torch.testing.assert_close(ops.packed_linear(x, packed), x @ weight.T, rtol=1e-4, atol=1e-3)


def test_leading_dimensions_strides_and_empty_sizes() -> None:
    packed, x = ops.pack_weight(randn(21, 33), "int8"), randn(2, 3, 33, seed=1)
    rows = ops.packed_linear(x.flatten(0, 1), packed)
    assert torch.equal(ops.packed_linear(x, packed), rows.view(2, 3, 21))
    assert torch.equal(ops.packed_linear(x[0, 0], packed), rows[0])
    assert torch.equal(ops.packed_linear(torch.stack([x, x], -1)[..., 0], packed), rows.view(2, 3, 21))
    assert ops.packed_linear(x[:0], packed).shape == (0, 3, 21)
    bias = randn(5, seed=2)
    for format in FORMATS:
        assert ops.packed_linear(x, ops.pack_weight(torch.zeros(0, 33), format)).shape == (2, 3, 0)
        empty = ops.pack_weight(torch.zeros(5, 0), format)
        assert torch.equal(ops.packed_linear(torch.zeros(2, 0), empty, bias), bias.expand(2, 5))
    half = bias.bfloat16()
    wide = ops.pack_weight(randn(5, 33), "bfloat16")
    assert torch.equal(ops.packed_linear(x, wide, half), ops.packed_linear(x, wide, half.float()))


def test_registration_and_compile() -> None:
    packed, x, bias = ops.pack_weight(randn(21, 33), "int4"), randn(2, 33, seed=1), randn(21)
    arguments = (x, packed.data, packed.scales, "int4", 32, 21, bias)
    torch.library.opcheck(torch.ops.fastsft.packed_linear.default, arguments)
    compiled = torch.compile(lambda x: ops.packed_linear(x, packed, bias) * 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ops.packed_linear(x, packed, bias))


def test_messages() -> None:
    weight = randn(8, 16)
    for call, message in [
        (lambda: ops.pack_weight(weight[0], "int8"), r"pack_weight: weight: expected floats \[N, K\]"),
        (lambda: ops.pack_weight(weight.double(), "int8"), "pack_weight: weight: .*float64"),
        (lambda: ops.pack_weight(weight, "int5"), "pack_weight: format: expected one of float32, .*, got 'int5'"),
        (lambda: ops.pack_weight(weight, "int4", group=48), "pack_weight: group: expected 32 or 64, got 48"),
        (lambda: ops.pack_weight([], "int8"), r"pack_weight: weight: expected floats \[N, K\] .*, got none"),
        (lambda: ops.pack_weight([weight, weight[:, 1:]], "int8"), r"pack_weight: weight: .*\[8, 15\]"),
        (
            lambda: ops.pack_weight(weight, "int8", out=ops.pack_weight(weight, "int4")),
            "pack_weight: out: expected int8",
        ),
        (lambda: ops.pack_weight(weight * torch.nan, "int8"), "pack_weight: weight: expected finite values"),
        (lambda: ops.pack_weight(weight * torch.inf, "int4"), "pack_weight: weight: expected finite values"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    packed = ops.pack_weight(weight, "int8")
    for x, bias, message in [
        (randn(2, 15), None, r"packed_linear: x: expected float32 or bfloat16 \[..., 16\] on the CPU"),
        (randn(2, 16).half(), None, "packed_linear: x: .*float16"),
        (randn(2, 16), randn(9), r"packed_linear: bias: expected floats \[8\]"),
        (randn(2, 16).requires_grad_(), None, "packed_linear: x: expected one that requires no gradient"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.packed_linear(x, packed, bias)
    x, out = randn(2, 16), torch.empty(2, 8)
    for data, scales, message in [
        (packed.data[1:], packed.scales, "packed_linear: data: expected 256 bytes"),
        (packed.data, packed.scales[:, :8], "packed_linear: scales"),
        (packed.data, torch.zeros(2, 64), r"packed_linear: scales: expected \[slabs, 64\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            _C.packed_linear(x, "int8", 0, data, scales, None, out)
    with pytest.raises(ValueError, match="packed_linear: scales: expected bfloat16"):
        _C.packed_linear(x, "int4", 32, torch.zeros(128, dtype=torch.uint8), torch.zeros(1, 1, 64), None, out)
    scales = torch.zeros(1, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="packed_linear: group"):
        _C.packed_linear(x, "int4", 8, torch.zeros(128, dtype=torch.uint8), scales, None, out)
