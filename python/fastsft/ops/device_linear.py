"""Linear layers of a step on a device: a weight as it is or quantised, and its product with the step's rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsft.ops._loss_products import multiply_cuda
from fastsft.ops.gemm import linear

FORMATS = ("float32", "bfloat16")


@dataclass(frozen=True)
class DeviceWeight:
    """A weight [N, K] as :func:`hold_weight` leaves it."""

    format: str
    shape: tuple[int, int]
    data: Tensor

    @property
    def nbytes(self) -> int:
        """What a product reads."""
        return self.data.nbytes


def hold_weight(
    weight: Sequence[Tensor], format: str, device: torch.device, *, out: DeviceWeight | None = None
) -> DeviceWeight:
    """Stack weights along N in the memory of a device.

    Args:
        weight: floats [N_i, K], wherever they are.
        format: "float32" or "bfloat16".
        device: where the result is.
        out: a weight of the same shape and format, whose memory is written and which is returned.

    Raises:
        ValueError: an unknown format, or shapes that do not fit each other or ``out``.
    """
    if format not in FORMATS:
        raise ValueError(f"hold_weight: format: expected one of {', '.join(FORMATS)}, got {format!r}")
    shapes = [list(w.shape) for w in weight]
    if not shapes or any(len(s) != 2 or s[1] != shapes[0][1] for s in shapes):
        raise ValueError(f"hold_weight: weight: expected [N, K] each, with one K, got {shapes}")
    shape = (sum(s[0] for s in shapes), shapes[0][1])
    if out is None:
        out = DeviceWeight(format, shape, torch.empty(shape, dtype=getattr(torch, format), device=device))
    if (out.format, out.shape) != (format, shape):
        raise ValueError(f"hold_weight: out: expected {format} {list(shape)}, got {out.format} {list(out.shape)}")
    for part, target in zip(weight, out.data.split_with_sizes([s[0] for s in shapes]), strict=True):
        target.copy_(part)
    return out


def device_linear(x: Tensor, weight: DeviceWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: x [T, K] and bias [N] in the type of the weight; [T, N] in x's type, rounded once."""
    return linear(x, weight.data, bias)


def device_logits(x: Tensor, weight: DeviceWeight, out: Tensor) -> None:
    """``out`` float32 [T, N] becomes ``x @ weight.T``, on a GPU not rounded to x's type: draws are made of it."""
    if x.is_cuda:
        multiply_cuda(x, weight.data.t(), out)
    else:
        out.copy_(linear(x.float(), weight.data.float()))
