"""Products of a few rows with quantised weights in Triton: the weights are read once and widened in registers.

The layout is that of ops/device_linear.py. Where N alone does not make programs enough to keep all multiprocessors
reading, the sum over K is split; the parts are added in order by a second kernel, so that two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsft.ops._triton import LAUNCH

_COLUMNS = 32
_WARPS, _STAGES = 4, 4
_PROGRAMS = 528  # four on each of 132 multiprocessors; fixed, as the order of a sum is part of its bits


# Sums in float32 of a tile [ROWS, COLUMNS] over one part of K, for M <= ROWS rows of x. Traffic: the weight once, N K
# bytes; x, 2 M K bytes, once from memory and for the other tiles of N from the L2 cache; 4 M N bytes of sums a part,
# written and read in the L2 cache. Arithmetic: 2 M flops a byte of the weight on matrix instructions, which pad M to
# 16: 32 to 128 flops a byte, an eighth to two fifths of what an H200 can do meanwhile. Memory-bound.
@triton.jit(do_not_specialize=["rows"])
def _int8(
    x, data, sums, rows, width, depth, part,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * part
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(first, tl.minimum(first + part, depth), DEPTH):
        k = begin + tl.arange(0, DEPTH)
        inside = (row < rows)[:, None] & (k < depth)[None, :]
        a = tl.load(x + row[:, None] * depth + k[None, :], mask=inside, other=0.0)
        inside = (column < width)[:, None] & (k < depth)[None, :]
        w = tl.load(data + column.to(tl.int64)[:, None] * depth + k[None, :], mask=inside, other=0)
        acc = tl.dot(a, w.to(a.dtype).trans(), acc, input_precision="ieee")
    at = (tl.program_id(1) * rows + row)[:, None].to(tl.int64) * width + column[None, :]
    tl.store(sums + at, acc, mask=(row < rows)[:, None] & (column < width)[None, :])


# As _int8 with half the bytes: N K / 2 of numbers and 2 N K / GROUP of scales, 0.5625 bytes a weight in groups of 32;
# hence twice its flops a byte. A byte has two numbers of one group, half a group apart: x comes in two tiles. Widening
# is 5 operations a weight: at 4.8 TB/s and 132 multiprocessors, 43 of the 128 lanes' slots a cycle.
@triton.jit(do_not_specialize=["rows"])
def _int4(
    x, data, scales, sums, rows, width, depth, groups, part,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * part
    byte = tl.arange(0, DEPTH // 2)
    low = byte // (GROUP // 2) * GROUP + byte % (GROUP // 2)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(first, tl.minimum(first + part, groups * GROUP), DEPTH):
        k = begin + low
        known = (row < rows)[:, None]
        a = tl.load(x + row[:, None] * depth + k[None, :], mask=known & (k < depth)[None, :], other=0.0)
        k += GROUP // 2
        b = tl.load(x + row[:, None] * depth + k[None, :], mask=known & (k < depth)[None, :], other=0.0)
        at = begin // 2 + byte
        inside = (column < width)[:, None] & (at < groups * (GROUP // 2))[None, :]
        start = column.to(tl.int64) * (groups * (GROUP // 2))
        pair = tl.load(data + start[:, None] + at[None, :], mask=inside, other=0)
        group = begin // GROUP + tl.arange(0, DEPTH // GROUP)
        inside = (column < width)[:, None] & (group < groups)[None, :]
        s = tl.load(scales + column.to(tl.int64)[:, None] * groups + group[None, :], mask=inside, other=0.0)
        s = tl.broadcast_to(s.to(tl.float32)[:, :, None], (COLUMNS, DEPTH // GROUP, GROUP // 2))
        s = tl.reshape(s, (COLUMNS, DEPTH // 2))
        # rounded as the whole weight is for prompts
        lows = (((pair & 15).to(tl.float32) - 8) * s).to(a.dtype)
        highs = (((pair >> 4).to(tl.float32) - 8) * s).to(a.dtype)
        acc = tl.dot(a, lows.trans(), acc, input_precision="ieee")
        acc = tl.dot(b, highs.trans(), acc, input_precision="ieee")
    at = (tl.program_id(1) * rows + row)[:, None].to(tl.int64) * width + column[None, :]
    tl.store(sums + at, acc, mask=(row < rows)[:, None] & (column < width)[None, :])


# Per element of the result: 4 bytes a part from the L2 cache, one written; a few flops.
@triton.jit
def _finish(
    sums, scales, bias, out, size, width, parts, SCALED: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(parts):
        total += tl.load(sums + at, mask=inside, other=0.0)
        sums += size
    if SCALED:
        total *= tl.load(scales + at % width, mask=inside, other=0.0)
    if BIASED:
        total += tl.load(bias + at % width, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def tile_of(rows: int) -> dict[str, int]:
    """With its four stages a tile of x and one of the weight take at most 86 KB: what every GPU since sm_80 has."""
    padded = max(16, triton.next_power_of_2(rows))
    return {"ROWS": padded, "COLUMNS": _COLUMNS, "DEPTH": 256 if padded == 16 else 128}


def product(x: Tensor, data: Tensor, scales: Tensor, group: int, bias: Tensor | None, out: Tensor) -> None:
    """``out`` [M, N] of any float type becomes x [M, K] @ weight.T + bias, M up to 64; ``group`` 0: int8."""
    (rows, depth), width = x.shape, data.shape[0]
    if not rows:
        return
    tile = tile_of(rows)
    tiles, steps = triton.cdiv(width, _COLUMNS), triton.cdiv(depth, tile["DEPTH"])
    each = triton.cdiv(steps, max(1, min(steps, _PROGRAMS // tiles)))
    part, parts = each * tile["DEPTH"], triton.cdiv(steps, each)
    sums = torch.empty(parts, rows, width, dtype=torch.float32, device=x.device)
    options = {"num_warps": _WARPS, "num_stages": _STAGES, **LAUNCH}
    x, grid = x.contiguous(), (tiles, parts)
    if group:
        groups = scales.shape[1]
        _int4[grid](x, data, scales, sums, rows, width, depth, groups, part, GROUP=group, **tile, **options)
    else:
        _int8[grid](x, data, sums, rows, width, depth, part, **tile, **options)
    _finish[(triton.cdiv(rows * width, 1024),)](
        sums, scales, sums if bias is None else bias, out, rows * width, width, parts,
        SCALED=not group, BIASED=bias is not None, BLOCK=1024, num_warps=4, **LAUNCH,
    )  # fmt: skip
