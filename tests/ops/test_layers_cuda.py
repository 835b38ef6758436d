"""rms_norm, apply_rope and swiglu on a CUDA device. Their kernels run under Triton's interpreter in test_triton.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import assert_as_good_as_torch
from layer_cases import DTYPES, with_gradients
from samples import randn

from fastsft import ops
from fastsft.ops import reference

pytestmark = pytest.mark.gpu

NORM_SHAPES = [(0, 8), (1, 1), (5, 7), (129, 200), (9000, 64), (4100, 896), (700, 4096), (70, 16_384), (9, 20_001)]
ROPE_SHAPES = [(0, 2, 8), (1, 1, 2), (5, 3, 10), (333, 7, 80), (1000, 14, 64), (500, 32, 128), (9, 2, 256)]
SWIGLU_SHAPES = [(0,), (1,), (2047,), (3, 11), (257, 1000), (1024, 4096)]


def norm_inputs(shape: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    return [randn(*shape, seed=1, dtype=dtype) * 3, 1 + randn(shape[-1], seed=2, dtype=dtype) / 2]


def rope_inputs(shape: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    angle = randn(shape[0], shape[2] // 2, seed=1) * 5
    return [randn(*shape, dtype=dtype), angle.cos().to(dtype), angle.sin().to(dtype)]


def swiglu_inputs(shape: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    return [randn(*shape, seed=1, dtype=dtype) * 4, randn(*shape, seed=2, dtype=dtype)]


# op, its formula, its inputs of a shape, how many of them get no gradient
OPS: dict[str, tuple[Any, Any, Any, int]] = {
    "rms_norm": (ops.rms_norm, reference.rms_norm, norm_inputs, 0),
    "apply_rope": (ops.apply_rope, reference.apply_rope, rope_inputs, 2),
    "swiglu": (ops.swiglu, reference.swiglu, swiglu_inputs, 0),
}
SHAPES = {"rms_norm": NORM_SHAPES, "apply_rope": ROPE_SHAPES, "swiglu": SWIGLU_SHAPES}
CASES = [(name, shape) for name, shapes in SHAPES.items() for shape in shapes]
BY_OP = pytest.mark.parametrize("name", OPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_against_the_formula(name: str, shape: Any, dtype: torch.dtype) -> None:
    ours, plain, build, constants = OPS[name]
    inputs = [x.cuda() for x in build(shape, dtype)]
    upstream = randn(*shape, seed=9, dtype=dtype).cuda()
    same = with_gradients(plain, inputs, dtype, upstream, constants)
    exact = with_gradients(plain, inputs, torch.float64, upstream, constants)
    found = with_gradients(ours, inputs, dtype, upstream, constants)
    assert_as_good_as_torch(found, same, exact)
    again = with_gradients(ours, inputs, dtype, upstream, constants)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "two runs differ"


@BY_OP
def test_strides_and_compile(name: str) -> None:
    ours, _, build, constants = OPS[name]
    shape = SHAPES[name][3]
    inputs = [x.cuda() for x in build(shape, torch.bfloat16)]
    upstream = randn(*shape, dtype=torch.bfloat16).cuda()
    first = with_gradients(ours, inputs, torch.bfloat16, upstream, constants)
    strided = [torch.stack([x, x], -1)[..., 0] for x in inputs]
    wide = torch.stack([upstream, upstream], -1)[..., 0]
    compiled = torch.compile(lambda *x: ours(*x), fullgraph=True)
    for found in (
        with_gradients(ours, strided, torch.bfloat16, wide, constants),
        with_gradients(compiled, inputs, torch.bfloat16, upstream, constants),
    ):
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


@BY_OP
def test_in_a_graph(name: str) -> None:
    """Captured after one call, replayed on other values."""
    ours, _, build, constants = OPS[name]
    shape = SHAPES[name][4]
    inputs = [x.cuda() for x in build(shape, torch.bfloat16)]
    leaves = [x.requires_grad_(i < len(inputs) - constants) for i, x in enumerate(inputs)]
    wanted = leaves[: len(inputs) - constants]
    upstream = randn(*shape, seed=9, dtype=torch.bfloat16).cuda()

    def step() -> list[torch.Tensor]:
        out = ours(*leaves)
        return [out.detach(), *torch.autograd.grad(out, wanted, upstream)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        inputs[0].copy_(randn(*inputs[0].shape, seed=33, dtype=torch.bfloat16))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, step(), strict=True))


def test_norm_keeps_the_bits_of_the_published_models() -> None:
    x, w = (t.cuda() for t in norm_inputs((640, 896), torch.bfloat16))
    wide = x.float()
    normal = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(torch.bfloat16)
    assert (ops.rms_norm(x, w) != w * normal).float().mean() < 1e-3  # a last bit of the mean


def test_swiglu_far_out() -> None:
    gate = torch.tensor([-1e30, -200.0, -90.0, -0.0, 90.0, 1e30, torch.inf, torch.nan], device="cuda").requires_grad_()
    up = torch.ones(8, device="cuda")
    out = ops.swiglu(gate, up)
    torch.testing.assert_close(out, reference.swiglu(gate, up), equal_nan=True)
    (gradient,) = torch.autograd.grad(out.sum(), gate)
    torch.testing.assert_close(gradient[:6].cpu(), torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0]))


@BY_OP
def test_past_two_to_the_31(name: str) -> None:
    """The last rows of more elements than 32 bits count."""
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GiB of free memory")
    tokens, width = (1 << 31) // 8192 + 3, 8192
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    last = x[-5:]
    if name == "rms_norm":
        weight = torch.ones(width, device="cuda", dtype=torch.bfloat16)
        found, expected = ops.rms_norm(x, weight)[-5:], ops.rms_norm(last, weight)
    elif name == "swiglu":
        found, expected = ops.swiglu(x, x)[-5:], ops.swiglu(last, last)
    else:
        cos, sin = (torch.rand(tokens, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        found = ops.apply_rope(x.view(tokens, 64, 128), cos, sin)[-5:]
        expected = ops.apply_rope(last.view(5, 64, 128), cos[-5:], sin[-5:])
    assert torch.equal(found, expected)
