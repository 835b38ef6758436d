"""rms_norm against its formula and against torch's own."""

from __future__ import annotations

import pytest
import torch
from layer_cases import DTYPES, check, check_manners

from fastsft import ops
from fastsft.ops import norm as module
from fastsft.ops import reference

SHAPES = [(0, 8), (1, 1), (5, 7), (3, 33), (40, 64), (129, 200)]


def inputs(rows: int, size: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(rows * 1000 + size)
    x = torch.randn(rows, size, generator=g) * 3
    return [x.to(dtype), (1 + 0.5 * torch.randn(size, generator=g)).to(dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_formula(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, w = inputs(*shape, dtype)
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    check(ops.rms_norm, reference.rms_norm, [x, w], upstream)


def test_against_torch_and_axes() -> None:
    x, w = inputs(24, 48)
    expected = torch.nn.functional.rms_norm(x, (48,), w, 1e-5)
    torch.testing.assert_close(ops.rms_norm(x.view(2, 3, 4, 48), w, 1e-5), expected.view(2, 3, 4, 48))


def test_bits_of_the_published_models() -> None:
    """Rounded before the weight is applied, as in transformers: the same bits in bfloat16."""
    x, w = inputs(64, 96, torch.bfloat16)
    wide = x.float()
    normal = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(torch.bfloat16)
    assert (ops.rms_norm(x, w) != w * normal).float().mean() < 1e-3  # a last bit of the mean


def test_a_nan_stays_in_its_row() -> None:
    x, w = inputs(40, 64)
    clean = ops.rms_norm(x, w)
    x[7, 3] = torch.nan
    dirty = ops.rms_norm(x, w)
    assert dirty[7].isnan().all()
    rows = torch.arange(40) != 7
    assert torch.equal(dirty[rows], clean[rows])


def test_manners() -> None:
    check_manners(ops.rms_norm, inputs(129, 200))
    x, w = inputs(5, 7)
    torch.library.opcheck(torch.ops.fastsft.rms_norm.default, (x, w, 1e-6))
    torch.library.opcheck(torch.ops.fastsft.rms_norm_backward.default, (x, x, w, torch.ones(5)))


def test_plain_torch_matches() -> None:
    x, w = inputs(33, 40)
    g = torch.randn(33, 40)
    out, scale = module._forward(x, w, 1e-6)
    for a, b in zip((out, scale), module._forward_torch(x, w, 1e-6), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(module._backward(g, x, w, scale), module._backward_torch(g, x, w, scale), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_messages() -> None:
    x, w = inputs(5, 7)
    with pytest.raises(ValueError, match=r"rms_norm: x: expected floats \[..., D\], got torch.int64 \[3\]"):
        ops.rms_norm(torch.zeros(3, dtype=torch.int64), w)
    with pytest.raises(ValueError, match=r"rms_norm: weight: expected torch.float32 \[7\], got torch.float32 \[6\]"):
        ops.rms_norm(x, w[:6])
    with pytest.raises(ValueError, match=r"weight: expected torch.bfloat16 \[7\], got torch.float32"):
        ops.rms_norm(x.bfloat16(), w)
