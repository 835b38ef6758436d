"""swiglu against torch's silu, at ordinary and at extreme values."""

from __future__ import annotations

import pytest
import torch
from layer_cases import DTYPES, check, check_manners

from fastsft import ops
from fastsft.ops import activation as module
from fastsft.ops import reference

SHAPES = [(0,), (1,), (3, 11), (70, 333)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(len(shape))
    return [(torch.randn(shape, generator=g) * 4).to(dtype), torch.randn(shape, generator=g).to(dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    check(ops.swiglu, reference.swiglu, inputs(shape, dtype), upstream)


def test_far_out() -> None:
    gate = torch.tensor([-1e30, -200.0, -90.0, -0.0, 90.0, 1e30, torch.inf, torch.nan]).requires_grad_()
    up = torch.ones(8)
    ops.swiglu(gate, up).sum().backward()
    expected = gate.detach().clone().requires_grad_()
    reference.swiglu(expected, up).sum().backward()
    torch.testing.assert_close(ops.swiglu(gate, up), reference.swiglu(gate, up), equal_nan=True)
    finite = gate.isfinite()
    torch.testing.assert_close(gate.grad[finite], expected.grad[finite])  # type: ignore[index]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_of_halves(rows: int, dtype: torch.dtype) -> None:
    gate, up = inputs((rows, 33), dtype)
    assert torch.equal(module.swiglu_halves(torch.cat([gate, up], 1)), ops.swiglu(gate, up))


def test_manners() -> None:
    check_manners(ops.swiglu, inputs((70, 333)))
    gate, up = inputs((11,))
    torch.library.opcheck(torch.ops.fastsft.swiglu.default, (gate, up))
    torch.library.opcheck(torch.ops.fastsft.swiglu_backward.default, (up, gate, up))
    torch.testing.assert_close(module._forward_torch(gate, up), module._forward(gate, up))
    for a, b in zip(module._backward_torch(up, gate, up), module._backward(up, gate, up), strict=True):
        torch.testing.assert_close(a, b)


def test_messages() -> None:
    gate, up = inputs((3, 11))
    with pytest.raises(ValueError, match=r"swiglu: gate: expected float32, bfloat16 or float16, got torch.float64"):
        ops.swiglu(gate.double(), up)
    with pytest.raises(ValueError, match=r"swiglu: up: expected torch.float32 \[3, 11\], got torch.float32 \[3, 10\]"):
        ops.swiglu(gate, up[:, :10])
