"""The gate of a gated linear unit with SiLU: one pass over memory each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsft import _C
from fastsft.ops._library import define, triton_or

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` (arXiv 2002.05202), in float32, rounded once.

    Args:
        gate: any shape, float32, bfloat16 or float16.
        up: like gate.

    Returns:
        Like gate.

    Raises:
        ValueError: shapes or dtypes out of contract, naming the argument.
    """
    if gate.dtype not in _FLOATS:
        raise ValueError(f"swiglu: gate: expected float32, bfloat16 or float16, got {gate.dtype}")
    if up.shape != gate.shape or up.dtype != gate.dtype:
        got = f"{up.dtype} {list(up.shape)}"
        raise ValueError(f"swiglu: up: expected {gate.dtype} {list(gate.shape)}, got {got}")
    out: Tensor = _SwiGLU.apply(gate.reshape(-1), up.reshape(-1))  # type: ignore[no-untyped-call]
    return out.view(gate.shape)


def swiglu_halves(gate_up: Tensor) -> Tensor:
    """:func:`swiglu` of the halves of each row, where they lie: [T, 2 F] of a float type -> [T, F]; no gradient."""
    out: Tensor = _swiglu_halves(gate_up)
    return out


# --- the ops ----------------------------------------------------------------------------------------------------------


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    _C.swiglu(gate, up, out)
    return out


def _forward_torch(gate: Tensor, up: Tensor) -> Tensor:
    return (torch.nn.functional.silu(gate.float()) * up.float()).to(gate.dtype)


def _backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    _C.swiglu_backward(gate, up, grad.contiguous(), d_gate, d_up)
    return d_gate, d_up


def _backward_torch(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    x, g = gate.float(), grad.float()
    s = torch.sigmoid(x)
    return (g * up.float() * (s + x * s * (1 - s))).to(gate.dtype), (g * x * s).to(up.dtype)


_swiglu = define(
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    fake=lambda gate, up: torch.empty_like(gate),
    cpu=_forward,
    **triton_or(_forward_torch, "activation", "swiglu"),
)
_swiglu_halves = define(
    "swiglu_halves(Tensor gate_up) -> Tensor",
    fake=lambda gate_up: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2),
    cpu=lambda gate_up: _forward(*(x.flatten() for x in gate_up.chunk(2, 1))).view(len(gate_up), gate_up.shape[1] // 2),
    **triton_or(lambda gate_up: _forward_torch(*gate_up.chunk(2, 1)), "activation", "swiglu_halves"),
)
_swiglu_backward = define(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    fake=lambda grad, gate, up: (torch.empty_like(gate), torch.empty_like(up)),
    cpu=_backward,
    **triton_or(_backward_torch, "activation", "swiglu_backward"),
)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        out: Tensor = _swiglu(gate, up)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _swiglu_backward(grad, *ctx.saved_tensors)
