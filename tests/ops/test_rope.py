"""apply_rope against its formula, a rotation of complex numbers, and its own inverse."""

from __future__ import annotations

import pytest
import torch
from layer_cases import DTYPES, check, check_manners

from fastsft import ops
from fastsft.ops import reference
from fastsft.ops import rope as module

SHAPES = [(0, 2, 8), (1, 1, 2), (5, 3, 10), (7, 2, 64), (33, 4, 128)]


def inputs(tokens: int, heads: int, size: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(tokens)
    angle = torch.randn(tokens, size // 2, generator=g) * 5
    x = torch.randn(tokens, heads, size, generator=g)
    return [x.to(dtype), angle.cos().to(dtype), angle.sin().to(dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_formula(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    check(ops.apply_rope, reference.apply_rope, inputs(*shape, dtype), upstream, constants=2)


def test_is_a_product_of_complex_numbers() -> None:
    x, cos, sin = inputs(33, 4, 128)
    turned = torch.complex(*x.chunk(2, -1)) * torch.complex(cos, sin)[:, None]
    torch.testing.assert_close(ops.apply_rope(x, cos, sin), torch.cat([turned.real, turned.imag], -1))


def test_inverse_and_length() -> None:
    x, cos, sin = inputs(33, 4, 128)
    turned = ops.apply_rope(x, cos, sin)
    torch.testing.assert_close(module._rope(turned, cos, sin, True), x)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(module._torch(x, cos, sin, True), module._native(x, cos, sin, True))


def test_manners() -> None:
    check_manners(ops.apply_rope, inputs(33, 4, 128), constants=2)
    torch.library.opcheck(torch.ops.fastsft.apply_rope.default, (*inputs(5, 3, 10), False))


def test_messages() -> None:
    x, cos, sin = inputs(5, 3, 10)
    with pytest.raises(ValueError, match=r"apply_rope: x: expected floats \[T, N, K\] with an even K"):
        ops.apply_rope(x[..., :9], cos, sin)
    with pytest.raises(
        ValueError, match=r"apply_rope: cos: expected torch.float32 \[5, 5\], got torch.float32 \[4, 5\]"
    ):
        ops.apply_rope(x, cos[:4], sin)
    with pytest.raises(ValueError, match=r"apply_rope: sin: expected torch.float32 \[5, 5\], got torch.float64"):
        ops.apply_rope(x, cos, sin.double())
