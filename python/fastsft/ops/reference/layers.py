"""The parts of a decoder layer besides attention."""

from __future__ import annotations

import torch


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K], weight [N, K], bias [N] -> [..., N]."""
    out = x @ weight.T
    return out if bias is None else out + bias


def pack_weight(weight: torch.Tensor, format: str, *, group: int = 32) -> torch.Tensor:
    """The weight [N, K] that a packed one stands for, in float32."""
    if format in ("float32", "bfloat16"):
        return weight.to(getattr(torch, format)).float()
    w = weight.float()
    if format in ("int8", "w8a8"):
        scale = w.abs().amax(1, keepdim=True) / 127
        return (w / scale).round().clamp(-127, 127).nan_to_num(0.0) * scale
    columns = []
    for part in torch.split(w, group, dim=1):
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        extreme = torch.where(high > -low, high, low)
        scale = (extreme / -8).bfloat16().float()  # as it is stored: the values are rounded on it
        columns.append((part / scale).round().clamp(-8, 7).nan_to_num(0.0) * scale)
    return torch.cat(columns, 1)


def round_to_int8(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] as ``packed_linear`` takes it in "w8a8": one scale per 128 channels; float64, where it is exact."""
    parts = []
    for part in torch.split(x.float(), 128, dim=-1):
        scale = (part.abs().amax(-1, keepdim=True) / 127).clamp_min(2.0**-126)
        parts.append((part * (1 / scale)).round().double() * scale.double())
    return torch.cat(parts, -1)


def packed_linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K], what ``pack_weight`` gave [N, K], bias [N] -> [..., N]."""
    return linear(x, packed.to(x.dtype), bias)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Rounded to x's type before the weight is applied."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x cos + rotate_half(x) sin, with each angle used twice."""
    a, b = x.chunk(2, -1)
    return x * torch.cat([cos, cos], -1)[:, None] + torch.cat([-b, a], -1) * torch.cat([sin, sin], -1)[:, None]


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * up
