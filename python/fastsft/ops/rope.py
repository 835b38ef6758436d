"""Rotary position embedding: one pass over memory each way, where eager torch makes about seven."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsft import _C
from fastsft.ops._library import define, triton_or

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + K / 2]) of every head by their angles (arXiv 2104.09864).

    The split-half layout of Hugging Face checkpoints: ``x * cos + rotate_half(x) * sin`` there, in float32, rounded
    once.

    Args:
        x: [T, N, K], N heads of even size K; float32, bfloat16 or float16.
        cos, sin: [T, K / 2], like x; not differentiated.

    Returns:
        [T, N, K], like x.

    Raises:
        ValueError: shapes or dtypes out of contract, naming the argument.
    """
    if x.dim() != 3 or x.dtype not in _FLOATS or x.shape[2] % 2:
        raise ValueError(f"apply_rope: x: expected floats [T, N, K] with an even K, got {x.dtype} {list(x.shape)}")
    shape = (x.shape[0], x.shape[2] // 2)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != shape or table.dtype != x.dtype:
            got = f"{table.dtype} {list(table.shape)}"
            raise ValueError(f"apply_rope: {name}: expected {x.dtype} {list(shape)}, got {got}")
    out: Tensor = _Rope.apply(x, cos.detach(), sin.detach())  # type: ignore[no-untyped-call]
    return out


# --- the op -----------------------------------------------------------------------------------------------------------


def _native(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    out = x.new_empty(x.shape)
    _C.rope(x.contiguous(), cos.contiguous(), sin.contiguous(), inverse, out)
    return out


def _torch(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    a, b = x.float().chunk(2, -1)
    c, s = cos.float()[:, None], sin.float()[:, None] * (-1 if inverse else 1)
    return torch.cat([a * c - b * s, b * c + a * s], -1).to(x.dtype)


_rope = define(
    "apply_rope(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor",
    fake=lambda x, cos, sin, inverse: x.new_empty(x.shape),
    cpu=_native,
    **triton_or(_torch, "rope", "apply_rope"),
)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        out: Tensor = _rope(x, cos, sin, False)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _rope(grad, *ctx.saved_tensors, True), None, None
