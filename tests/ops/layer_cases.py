"""What the ops of a decoder layer have in common: gradients against autograd on a plain formula, and their manners."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import assert_as_good_as_torch

from fastsft import _C

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def with_gradients(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], dtype: torch.dtype,
                   upstream: torch.Tensor, constants: int = 0) -> list[torch.Tensor]:  # fmt: skip
    """The result and the gradients of all inputs but the last ``constants``."""
    leaves = [t.to(dtype).detach() for t in inputs]
    for leaf in leaves[: len(leaves) - constants]:
        leaf.requires_grad_()
    out = function(*leaves)
    out.backward(upstream.to(dtype))
    gradients = [leaf.grad for leaf in leaves[: len(leaves) - constants]]
    return [out.detach(), *[g for g in gradients if g is not None]]


def check(ours: Any, plain: Any, inputs: list[torch.Tensor], upstream: torch.Tensor, constants: int = 0) -> None:
    """On every instruction set, against the plain formula in the same type and in float64."""
    dtype = inputs[0].dtype
    same = with_gradients(plain, inputs, dtype, upstream, constants)
    exact = with_gradients(plain, inputs, torch.float64, upstream, constants)
    for isa in _C.available_isas():
        _C.set_isa(isa)
        assert_as_good_as_torch(with_gradients(ours, inputs, dtype, upstream, constants), same, exact)


def check_manners(ours: Any, inputs: list[torch.Tensor], constants: int = 0) -> None:
    """Threads do not change bits, strides do not matter, graphs compile, second derivatives are refused."""
    g = torch.randn(ours(*inputs).shape, generator=torch.Generator().manual_seed(9)).to(inputs[0].dtype)
    first = with_gradients(ours, inputs, inputs[0].dtype, g, constants)
    for n in (1, 3):
        _C.set_num_threads(n)
        again = with_gradients(ours, inputs, inputs[0].dtype, g, constants)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    strided = [torch.stack([t, t], -1)[..., 0] for t in inputs]
    wide = torch.stack([g, g], -1)[..., 0]
    again = with_gradients(ours, strided, inputs[0].dtype, wide, constants)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    compiled = torch.compile(lambda *x: ours(*x) * 1, fullgraph=True, backend="aot_eager")
    again = with_gradients(compiled, inputs, inputs[0].dtype, g, constants)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    leaf = inputs[0].detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(ours(leaf, *inputs[1:]).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
