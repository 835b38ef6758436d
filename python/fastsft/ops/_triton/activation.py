"""The gate of a gated linear unit in Triton: the contract of csrc/include/fastsft/activation.h."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsft.ops._triton import LAUNCH

_BLOCK, _WARPS = 2048, 4  # 16 elements a thread: two loads of 16 bytes of each input in 16 bits


# Per element of b bytes: gate and up read, the result written: 3 b bytes, one exp, 4 flops. Memory-bound.
@triton.jit
def _forward(gate, up, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    x = tl.load(gate + at, mask=inside).to(tl.float32)
    u = tl.load(up + at, mask=inside).to(tl.float32)
    tl.store(out + at, (x * tl.sigmoid(x) * u).to(out.dtype.element_ty), mask=inside)


# As _forward, of the halves of a row; a program takes BLOCK columns of one, so that nothing is divided.
@triton.jit
def _halves(gate_up, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(gate_up + row * (2 * width) + column, mask=inside).to(tl.float32)
    u = tl.load(gate_up + row * (2 * width) + width + column, mask=inside).to(tl.float32)
    tl.store(out + row * width + column, (x * tl.sigmoid(x) * u).to(out.dtype.element_ty), mask=inside)


# Per element: gate, up and the gradient read once, both gradients written: 5 b bytes, one exp, 11 flops. The sigmoid is
# computed again rather than kept: 4 bytes more each way would cost more than an exp. Memory-bound.
@triton.jit
def _backward(grad, gate, up, d_gate, d_up, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = tl.load(grad + at, mask=inside).to(tl.float32)
    x = tl.load(gate + at, mask=inside).to(tl.float32)
    u = tl.load(up + at, mask=inside).to(tl.float32)
    s = tl.sigmoid(x)
    tl.store(d_gate + at, (g * u * (s + x * s * (1 - s))).to(d_gate.dtype.element_ty), mask=inside)
    tl.store(d_up + at, (g * x * s).to(d_up.dtype.element_ty), mask=inside)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate and up [n], contiguous."""
    out = torch.empty_like(gate)
    if gate.numel():
        _forward[(triton.cdiv(gate.numel(), _BLOCK),)](
            gate, up, out, gate.numel(), BLOCK=_BLOCK, num_warps=_WARPS, **LAUNCH
        )
    return out


def swiglu_halves(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2 F] -> [T, F]."""
    gate_up = gate_up.contiguous()
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    if out.numel():
        _halves[(rows, triton.cdiv(width, _BLOCK))](gate_up, out, width, BLOCK=_BLOCK, num_warps=_WARPS, **LAUNCH)
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up; gate and up [n], contiguous."""
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    if gate.numel():
        _backward[(triton.cdiv(gate.numel(), _BLOCK),)](
            grad.contiguous(), gate, up, d_gate, d_up, gate.numel(), BLOCK=_BLOCK, num_warps=_WARPS, **LAUNCH
        )
    return d_gate, d_up
