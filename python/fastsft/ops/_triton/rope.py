"""Rotary position embedding in Triton: csrc/include/fastsft/rope.h's contract, for any strides of tokens and heads."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastsft.ops._triton import LAUNCH


# Per token of N heads of K elements of b bytes: x read, the result written, its K / 2 cosines and sines read from
# memory once and for the other heads from cache: 2 b N K + b K bytes, 3 flops an element. Memory-bound. Rows are heads
# of tokens, so that neither many heads nor few (grouped keys) leave a program's tile partly empty.
@triton.jit(do_not_specialize=["rows"])
def _rotate(
    x, cos, sin, out, rows, token_stride, head_stride,
    HEADS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    token, head = row // HEADS, row % HEADS
    inside = (row < rows)[:, None] & (column < HALF)
    at = (token * token_stride + head * head_stride)[:, None] + column
    angle = token[:, None] * HALF + column
    u = tl.load(x + at, mask=inside)
    v = tl.load(x + at + HALF, mask=inside)
    c = tl.load(cos + angle, mask=inside).to(tl.float32)
    s = tl.load(sin + angle, mask=inside).to(tl.float32)
    if INVERSE:
        s = -s
    first = u.to(tl.float32) * c - v.to(tl.float32) * s
    second = v.to(tl.float32) * c + u.to(tl.float32) * s
    to = row[:, None] * (2 * HALF) + column
    tl.store(out + to, first.to(u.dtype), mask=inside)
    tl.store(out + to + HALF, second.to(u.dtype), mask=inside)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """x [T, N, K], cos and sin [T, K / 2] -> [T, N, K], contiguous."""
    out = x.new_empty(x.shape)
    if not x.numel():
        return out
    x = x if x.stride(2) == 1 else x.contiguous()
    tokens, heads, half = x.shape[0], x.shape[1], x.shape[2] // 2
    block = triton.next_power_of_2(half)
    tile = max(1, 1024 // block)  # 8 pairs a thread: with two tables, 16 bytes of each of four inputs in 16 bits
    _rotate[(triton.cdiv(tokens * heads, tile),)](
        x, cos.contiguous(), sin.contiguous(), out, tokens * heads, x.stride(0), x.stride(1),
        HEADS=heads, HALF=half, ROWS=tile, BLOCK=block, INVERSE=inverse, num_warps=4, **LAUNCH,
    )  # fmt: skip
    return out
