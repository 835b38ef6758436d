"""Root mean square norm: one pass over memory forward, one backward, where eager torch makes six and more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsft import _C
from fastsft.ops._library import define, triton_or

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis (arXiv 1910.07467).

    Normalised in float32, rounded to x's type, then multiplied by the weight: the order the published models were
    trained with, which differs from ``torch.nn.RMSNorm`` in bfloat16.

    Args:
        x: [..., D], float32, bfloat16 or float16.
        weight: [D], like x. Its gradient is summed in float32.
        eps: added to the mean of squares.

    Returns:
        [..., D], like x.

    Raises:
        ValueError: shapes or dtypes out of contract, naming the argument.
    """
    if x.dim() < 1 or x.dtype not in _FLOATS:
        raise ValueError(f"rms_norm: x: expected floats [..., D], got {x.dtype} {list(x.shape)}")
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        got = f"{weight.dtype} {list(weight.shape)}"
        raise ValueError(f"rms_norm: weight: expected {x.dtype} [{x.shape[-1]}], got {got}")
    rows: Tensor = _RMSNorm.apply(x.reshape(-1, x.shape[-1]), weight, float(eps))  # type: ignore[no-untyped-call]
    return rows.view(x.shape)


# --- the ops ----------------------------------------------------------------------------------------------------------


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, scale = torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)
    _C.rms_norm(x, weight.float(), eps, out, scale)
    return out, scale


def _forward_torch(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(x.float().square().mean(-1) + eps)
    return (x * scale[:, None]).to(x.dtype) * weight, scale


def _backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    d_x, d_weight = torch.empty_like(x), torch.empty_like(weight, dtype=torch.float32)
    _C.rms_norm_backward(x, weight.float(), scale, grad.contiguous(), d_x, d_weight)
    return d_x, d_weight.to(weight.dtype)


def _backward_torch(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    normal, g = x.float() * scale[:, None], grad.float()
    weighted = g * weight.float()
    d_x = (weighted - normal * (weighted * normal).mean(-1, keepdim=True)) * scale[:, None]
    return d_x.to(x.dtype), (g * normal.to(x.dtype)).sum(0).to(weight.dtype)


_rms_norm = define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    fake=lambda x, weight, eps: (torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)),
    cpu=_forward,
    **triton_or(_forward_torch, "norm", "rms_norm"),
)
_rms_norm_backward = define(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale) -> (Tensor, Tensor)",
    fake=lambda grad, x, weight, scale: (torch.empty_like(x), torch.empty_like(weight)),
    cpu=_backward,
    **triton_or(_backward_torch, "norm", "rms_norm_backward"),
)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        out, scale = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        d_x, d_weight = _rms_norm_backward(grad, *ctx.saved_tensors)
        return d_x, d_weight, None
