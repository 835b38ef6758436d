"""The Triton kernels' launchers on CPU tensors: run by test_triton.py in a process of its own, under Triton's
interpreter."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import assert_as_good_as_torch
from layer_cases import DTYPES, with_gradients
from samples import randn

from fastsft.ops import reference
from fastsft.ops._library import triton_or
from fastsft.ops._triton import activation, device_linear, norm, rope, sampling
from fastsft.ops.device_linear import hold_weight, widened_product
from fastsft.ops.sampling import best_tokens

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("set TRITON_INTERPRET=1: these tensors are not on a GPU")

EPS = 1e-6
# Off every tile; rows that share a program, that fill one, of which a program takes several.
NORM_SHAPES = [(0, 8), (1, 1), (5, 7), (129, 200), (40, 64), (70, 1025), (9, 4096)]
# The widest take seconds: one type each.
NORM_CASES = [*itertools.product(NORM_SHAPES, DTYPES), ((3, 16_384), torch.bfloat16), ((2, 16_391), torch.float32)]
ROPE_SHAPES = [(0, 2, 8), (1, 1, 2), (5, 3, 10), (33, 7, 80), (40, 14, 64), (9, 2, 256)]
SWIGLU_SIZES = [0, 1, 2047, 2048, 2049, 10_001]


def agrees(results: Any, plain: Callable[..., torch.Tensor], inputs: list[torch.Tensor], upstream: torch.Tensor,
           constants: int = 0) -> None:  # fmt: skip
    dtype = inputs[0].dtype
    same = with_gradients(plain, inputs, dtype, upstream, constants)
    exact = with_gradients(plain, inputs, torch.float64, upstream, constants)
    assert len(results) == len(exact)
    assert all(r.dtype == dtype for r in results)
    assert_as_good_as_torch(results, same, exact)


@pytest.mark.parametrize(("shape", "dtype"), NORM_CASES, ids=str)
def test_norm(shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "_PARTS", 8)  # so that few rows make a program of the backward pass take several tiles
    x, w = randn(*shape, seed=1, dtype=dtype) * 3, 1 + randn(shape[1], seed=2, dtype=dtype) / 2
    g = randn(*shape, seed=3, dtype=dtype)
    out, scale = norm.rms_norm(x, w, EPS)
    torch.testing.assert_close(scale, torch.rsqrt(x.float().square().mean(-1) + EPS))
    gradients = norm.rms_norm_backward(g, x, w, scale)
    agrees([out, *gradients], lambda x, w: reference.rms_norm(x, w, EPS), [x, w], g)
    assert all(torch.equal(a, b) for a, b in zip(gradients, norm.rms_norm_backward(g, x, w, scale), strict=True))


def test_norm_rounds_before_the_weight() -> None:
    """As in the published models. In float16 only: the interpreter cuts bfloat16 off where a GPU rounds."""
    dtype = torch.float16
    x, w = randn(64, 96, seed=1, dtype=dtype), 1 + randn(96, seed=2, dtype=dtype) / 2
    out, scale = norm.rms_norm(x, w, EPS)
    normal = (x.float() * scale[:, None]).to(dtype)
    assert torch.equal(out, w * normal)
    g = randn(64, 96, seed=3, dtype=dtype)
    _, d_weight = norm.rms_norm_backward(g, x, w, scale)
    torch.testing.assert_close(d_weight, (g.float() * normal.float()).sum(0).to(dtype))


def test_norm_keeps_a_nan_in_its_row() -> None:
    x, w = randn(40, 64), torch.ones(64)
    clean, _ = norm.rms_norm(x, w, EPS)
    x[7, 3] = torch.nan
    dirty, scale = norm.rms_norm(x, w, EPS)
    d_x, _ = norm.rms_norm_backward(torch.ones_like(x), x, w, scale)
    others = torch.arange(40) != 7
    assert dirty[7].isnan().all()
    assert torch.equal(dirty[others], clean[others])
    assert d_x[others].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROPE_SHAPES, ids=str)
def test_rope(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tokens, _, size = shape
    angle = randn(tokens, size // 2, seed=1) * 5
    x, cos, sin = randn(*shape, dtype=dtype), angle.cos().to(dtype), angle.sin().to(dtype)
    g = randn(*shape, seed=2, dtype=dtype)
    results = [rope.apply_rope(x, cos, sin, False), rope.apply_rope(g, cos, sin, True)]
    agrees(results, reference.apply_rope, [x, cos, sin], g, constants=2)


def test_rope_of_strided_heads() -> None:
    """Queries in the middle of a fused projection, heads before tokens, and every other element."""
    angle = randn(9, 8, seed=1)
    cos, sin = angle.cos(), angle.sin()
    fused = randn(9, 7, 16)
    for x in (fused[:, 2:5], randn(3, 9, 16).transpose(0, 1), randn(9, 3, 32)[..., ::2]):
        expected = reference.apply_rope(x, cos, sin)
        torch.testing.assert_close(rope.apply_rope(x, cos, sin, False), expected)
        torch.testing.assert_close(rope.apply_rope(x, cos.T.contiguous().T, sin, False), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SWIGLU_SIZES)
def test_swiglu(size: int, dtype: torch.dtype) -> None:
    gate, up, g = randn(size, dtype=dtype) * 4, randn(size, seed=1, dtype=dtype), randn(size, seed=2, dtype=dtype)
    results = [activation.swiglu(gate, up), *activation.swiglu_backward(g, gate, up)]
    agrees(results, reference.swiglu, [gate, up], g)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (3, 2047), (2, 2049), (5, 96)])
def test_swiglu_of_halves(rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = randn(rows, 2 * width, dtype=dtype) * 4
    expected = activation.swiglu(*(x.flatten() for x in gate_up.chunk(2, 1)))
    assert torch.equal(activation.swiglu_halves(gate_up).flatten(), expected)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_swiglu_far_out() -> None:
    gate, up = torch.tensor([-1e30, -200.0, -90.0, -0.0, 90.0, 1e30, torch.inf, torch.nan]), torch.ones(8)
    torch.testing.assert_close(activation.swiglu(gate, up), reference.swiglu(gate, up), equal_nan=True)
    d_gate, _ = activation.swiglu_backward(up, gate, up)
    torch.testing.assert_close(d_gate[:6], torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0]))


@pytest.mark.parametrize("vocab", [1, 17, 4096, 9000])
def test_draws(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against plain torch in float64; the last token of a chunk, ties and rows that nothing is left of included."""
    monkeypatch.setattr(sampling, "_BLOCK", 1024)
    scores = randn(12, vocab) * 2
    scores[:2] = 0
    scores[2] = -torch.inf
    scores[2, -1] = 0
    temperature = (torch.arange(12) % 3).float()
    seeds, positions = torch.randint(-(2**63), 2**63 - 1, (12,)), torch.randint(0, 2**40, (12,))
    ids = sampling.best_tokens(scores, temperature, seeds, positions)
    assert torch.equal(ids, best_tokens(scores.double(), temperature, seeds, positions))
    assert ids[0] == 0


def test_noise_near_its_ends() -> None:
    """Every token is drawn as often as its noise says: the greatest noise of 2 million, from the finest numbers."""
    scores, one = torch.zeros(2, 1 << 20), torch.ones(2)
    seeds, positions = torch.tensor([3, 4]), torch.zeros(2, dtype=torch.int64)
    assert torch.equal(
        sampling.best_tokens(scores, one, seeds, positions), best_tokens(scores.double(), one, seeds, positions)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "k", "n"), [(1, 256, 32), (3, 200, 65), (17, 700, 33), (64, 1300, 7), (0, 64, 5)])
@pytest.mark.parametrize(("format", "group"), [("int8", 32), ("int4", 32), ("int4", 64)])
def test_products_with_few_rows(
    format: str, group: int, rows: int, k: int, n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums over K in one part and in several; results in x's type and in float32, with a bias and without."""
    held = hold_weight([randn(n, k)], format, torch.device("cpu"), group=group)
    x, bias = randn(rows, k, seed=1, dtype=dtype), randn(n, seed=2, dtype=dtype)
    for programs in (1, 528):
        monkeypatch.setattr(device_linear, "_PROGRAMS", programs)
        for b, out_dtype in ((bias, dtype), (None, torch.float32)):
            found, expected = (torch.full((rows, n), torch.nan, dtype=out_dtype) for _ in range(2))
            for product, out in ((device_linear.product, found), (widened_product, expected)):
                product(x, held.data, held.scales, held.group, b, out)
            torch.testing.assert_close(found, expected, rtol=1e-3 if out_dtype == torch.float16 else 1e-5, atol=2e-4)


def test_a_nan_stays_in_its_row() -> None:
    held = hold_weight([randn(40, 300)], "int4", torch.device("cpu"))
    x, clean, dirty = randn(3, 300), torch.empty(3, 40), torch.empty(3, 40)
    device_linear.product(x, held.data, held.scales, 32, None, clean)
    x[1, 299] = torch.nan
    device_linear.product(x, held.data, held.scales, 32, None, dirty)
    assert dirty[1].isnan().all()
    assert torch.equal(dirty[::2], clean[::2])


def test_launched_as_the_ops_do() -> None:
    """What the dispatcher calls for CUDA tensors finds its launcher, and hands on its arguments."""

    def call(module: str, launcher: str, *inputs: Any) -> Any:
        return triton_or(lambda: None, module, launcher)["cuda"](*inputs)

    x, w, g = randn(5, 8), randn(8, seed=1), randn(5, 8, seed=2)
    out, scale = call("norm", "rms_norm", x, w, EPS)
    torch.testing.assert_close(out, reference.rms_norm(x, w, EPS))
    d_x, d_w = call("norm", "rms_norm_backward", g, x, w, scale)
    assert torch.equal(d_x, norm.rms_norm_backward(g, x, w, scale)[0])
    assert torch.equal(d_w, norm.rms_norm_backward(g, x, w, scale)[1])
    turned = call("rope", "apply_rope", x[:, None], x[:, :4], g[:, :4], False)
    torch.testing.assert_close(turned, reference.apply_rope(x[:, None], x[:, :4], g[:, :4]))
    torch.testing.assert_close(call("activation", "swiglu", w, g[0]), reference.swiglu(w, g[0]))
    for a, b in zip(
        call("activation", "swiglu_backward", w, g[0], g[1]),
        activation.swiglu_backward(w, g[0], g[1]),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_strided_gradients() -> None:
    gate, up, wide = randn(300, seed=1), randn(300, seed=2), randn(300, 2)
    for a, b in zip(
        activation.swiglu_backward(wide[:, 0], gate, up),
        activation.swiglu_backward(wide[:, 0].contiguous(), gate, up),
        strict=True,
    ):
        assert torch.equal(a, b)
    x, w, grad = randn(20, 30), randn(30), randn(30, 20).T
    scale = torch.ones(20)
    for a, b in zip(
        norm.rms_norm_backward(grad, x, w, scale),
        norm.rms_norm_backward(grad.contiguous(), x, w, scale),
        strict=True,
    ):
        assert torch.equal(a, b)
