"""Root mean square norm in Triton: the contract of csrc/include/fastsft/norm.h, on contiguous rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsft.ops._triton import LAUNCH

# Rows of partial sums of dw, at most. Fixed, not the number of multiprocessors: the order of a sum is part of its bits.
# Enough programs to keep 132 multiprocessors reading, few enough for the partial sums to stay in the L2 cache.
_PARTS = 512


# Per row of D elements of b bytes: x read once and kept in registers, y written: 2 b D bytes, 4 D flops. The weight
# comes from the L2 cache. Memory-bound.
@triton.jit(do_not_specialize=["rows"])
def _forward(x, weight, out, scale, rows, eps, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    at = row[:, None] * WIDTH + column[None, :]
    v = tl.load(x + at, mask=inside, other=0.0)
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    wide = v.to(tl.float32)
    s = tl.rsqrt(tl.sum(wide * wide, 1) / WIDTH + eps)
    tl.store(scale + row, s, mask=row < rows)
    normal = (wide * s[:, None]).to(v.dtype).to(tl.float32)  # rounded before the weight, as the contract says
    tl.store(out + at, (normal * w[None, :]).to(v.dtype), mask=inside)


# Per row: x and the gradient read, dx written: 3 b D bytes, 11 D flops; besides, 4 D bytes a program of partial sums of
# dw, written here and read by _sum_parts, at most 512 programs. Memory-bound.
@triton.jit(do_not_specialize=["rows"])
def _backward(grad, x, weight, scale, d_x, parts, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
        at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        v = tl.load(x + at, mask=inside, other=0.0)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(scale + row, mask=row < rows, other=0.0)[:, None]
        # from cache for every row: kept, it would take the registers of a third program on the multiprocessor
        w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
        normal = v.to(tl.float32) * s
        weighted = g * w
        mean = tl.sum(weighted * normal, 1)[:, None] / WIDTH
        tl.store(d_x + at, ((weighted - normal * mean) * s).to(v.dtype), mask=inside)
        sums += g * normal.to(v.dtype).to(tl.float32)
    part = parts + tl.program_id(0).to(tl.int64) * WIDTH
    tl.store(part + column, tl.sum(sums, 0), mask=column < WIDTH)


# The columns of the partial sums: 4 D bytes a program of _backward, from the L2 cache, as many flops.
@triton.jit(do_not_specialize=["count"])
def _sum_parts(parts, d_weight, count, WIDTH: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    part = tl.arange(0, COUNT)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (part < count)[:, None] & (column < WIDTH)[None, :]
    sums = tl.load(parts + part.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)
    tl.store(d_weight + column, tl.sum(sums, 0).to(d_weight.dtype.element_ty), mask=column < WIDTH)


def _tile(width: int) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, and its warps.

    16 elements a thread where there are enough; narrow rows, as those of a norm of queries and keys, share a program.
    Rows of up to 16,384 columns, 32 a thread, stay in registers, but for 50 to 120 bytes a thread backward; wider ones
    are right, but spill.
    """
    block = triton.next_power_of_2(width)
    rows = max(1, 2048 // block)
    return rows, block, min(16, rows * block // 512)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [rows, D] and weight [D], contiguous -> the result like x, 1 / sqrt(mean(x^2) + eps) [rows] in float32."""
    out, scale = torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)
    if x.numel():
        rows, block, warps = _tile(x.shape[1])
        _forward[(triton.cdiv(x.shape[0], rows),)](
            x,
            weight,
            out,
            scale,
            x.shape[0],
            eps,
            WIDTH=x.shape[1],
            ROWS=rows,
            BLOCK=block,
            num_warps=warps,
            **LAUNCH,
        )
    return out, scale


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight; x and weight contiguous."""
    if not x.numel():
        return torch.empty_like(x), torch.zeros_like(weight)
    d_x, d_weight = torch.empty_like(x), torch.empty_like(weight)
    rows, block, warps = _tile(x.shape[1])
    programs = min(_PARTS, triton.cdiv(x.shape[0], rows))
    parts = x.new_empty(programs, x.shape[1], dtype=torch.float32)
    _backward[(programs,)](
        grad.contiguous(), x, weight, scale, d_x, parts, x.shape[0],
        WIDTH=x.shape[1], ROWS=rows, BLOCK=block, num_warps=warps, **LAUNCH,
    )  # fmt: skip
    _sum_parts[(triton.cdiv(x.shape[1], 32),)](
        parts, d_weight, programs, WIDTH=x.shape[1], COUNT=_PARTS, BLOCK=32, num_warps=8, **LAUNCH
    )
    return d_x, d_weight
