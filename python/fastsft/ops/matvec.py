"""Linear layers of decoding: a weight packed once, quantised or not, and its product with a few rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsft import _C
from fastsft.ops._library import define
from fastsft.ops._registry import Implementation, record

FORMATS = ("float32", "bfloat16", "int8", "int4", "w8a8")
_PER_CHANNEL = ("int8", "w8a8")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INPUTS = (torch.float32, torch.bfloat16)
_SLAB = 64  # output channels that are packed together


@dataclass(frozen=True)
class PackedWeight:
    """A weight [N, K] as ``pack_weight`` leaves it. The layout is the same for every instruction set."""

    format: str
    shape: tuple[int, int]
    group: int  # of int4: input channels that share a scale; 0 otherwise
    data: Tensor  # uint8
    scales: Tensor  # int8, w8a8: float32 [slabs, 64]; int4: bfloat16 [slabs, groups, 64]; otherwise empty

    @property
    def nbytes(self) -> int:
        """What a product reads."""
        return self.data.nbytes + self.scales.nbytes

    def dequantize(self) -> Tensor:
        """The weight this stands for, float32 [N, K]: minus the original it is the quantisation error."""
        n, k = self.shape
        values = torch.empty(n, k, dtype=_stored(self.format))
        _C.unpack_weight(self.format, self.data, values)
        if self.format in _PER_CHANNEL:
            return values * self.scales.flatten()[:n, None]
        if self.format == "int4":
            scales = self.scales.float().transpose(1, 2).flatten(0, 1)[:n]  # [N, groups]
            return values * scales.repeat_interleave(self.group, 1)[:, :k]
        return values.float()


def pack_weight(
    weight: Tensor | Sequence[Tensor], format: str, *, group: int = 32, out: PackedWeight | None = None
) -> PackedWeight:
    """Lay a weight out for ``packed_linear``, once, quantising it where the format says so.

    "int8" is symmetric with one float32 scale per output channel, its largest magnitude / 127. "int4" is symmetric
    with one bfloat16 scale per ``group`` input channels, chosen so that the largest magnitude becomes -8 (as in
    llama.cpp's Q4_0): 4.5 bits per element in groups of 32, 4.25 in groups of 64. On normally distributed weights the
    relative error is 0.8 % in int8 (K = 1,024), 8.6 % in int4 with groups of 32 and 9.5 % with 64; of a weight of
    yours it is ``(packed.dequantize() - weight).norm() / weight.norm()``.

    "w8a8" is the weight of int8, multiplied with x in 8 bits too: a row of x has one scale per 128 input channels,
    their largest magnitude / 127, which on normally distributed x is a relative error of 0.65 %. With one row it is as
    fast as int8; with 8 or 16 rows it takes two thirds to half of int8's time where the CPU has 8-bit dot products.

    Args:
        weight: [N, K], float32, bfloat16 or float16, on the CPU; or several, of one type, to be stacked along N.
        format: "float32", "bfloat16", "int8", "int4" or "w8a8".
        group: 32 or 64; for int4 only.
        out: a packed weight of the same shape, format and group, whose memory is written and which is returned.

    Returns:
        A copy: later changes to ``weight`` do not reach it.

    Raises:
        ValueError: shape, type, format or group out of contract; a NaN or infinity to be quantised (``out`` is then
            undefined).
    """
    parts = [weight.detach()] if isinstance(weight, Tensor) else [w.detach() for w in weight]
    for w in parts:
        if w.dim() != 2 or (w.dtype, w.shape[1]) != (parts[0].dtype, parts[0].shape[1]) or not _packable(w):
            got = f"{w.dtype} {list(w.shape)} on {w.device}"
            raise ValueError(f"pack_weight: weight: expected floats [N, K] on the CPU, got {got}")
    if not parts:
        raise ValueError("pack_weight: weight: expected floats [N, K] on the CPU, got none")
    if format not in FORMATS:
        raise ValueError(f"pack_weight: format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if group not in (32, 64):
        raise ValueError(f"pack_weight: group: expected 32 or 64, got {group}")
    n, k = sum(len(w) for w in parts), parts[0].shape[1]
    mine = (format, (n, k), group if format == "int4" else 0)
    if out is None:
        out = empty_packed(format, (n, k), group, lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
    if (out.format, out.shape, out.group) != mine:
        got = f"{out.format} {list(out.shape)}, group {out.group}"
        raise ValueError(f"pack_weight: out: expected {format} {[n, k]}, group {mine[2]}, got {got}")
    rows = [w if w.stride(1) == 1 or k <= 1 else w.contiguous() for w in parts]
    _C.pack_weight(rows, *mine[::2], n, k, out.data, out.scales)
    return out


def empty_packed(format: str, shape: tuple[int, int], group: int, empty: Callable[[int], Tensor]) -> PackedWeight:
    """For :func:`pack_weight` to fill, in memory that ``empty`` gives: uint8 tensors of so many bytes."""
    n, k = shape
    slabs = -(-n // _SLAB)
    scales = torch.empty(0, dtype=torch.float32)
    if format in _PER_CHANNEL:
        scales = empty(slabs * _SLAB * 4).view(torch.float32).view(slabs, _SLAB)
    elif format == "int4":
        scales = empty(slabs * -(-k // group) * _SLAB * 2).view(torch.bfloat16).view(slabs, -(-k // group), _SLAB)
    return PackedWeight(format, shape, group if format == "int4" else 0, empty(_C.packed_bytes(format, n, k)), scales)


def packed_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` with a weight from ``pack_weight``, for the few rows of a decoding step; no gradient.

    Up to 16 rows read the weight from memory once; more go through 16 at a time. A row's bits depend on the row, the
    weight and the instruction set alone: not on how many rows share the call, their contents or the number of threads.
    x is quantised in "w8a8" only, and sums are float32.

    Args:
        x: [..., K], float32 or bfloat16.
        packed: from ``pack_weight``; any format with either type of x.
        bias: [N], floating point, added in float32.

    Returns:
        [..., N] in x's type, rounded once.

    Raises:
        ValueError: shapes, types or device out of contract, naming the argument; an x that requires a gradient.
    """
    n, k = packed.shape
    if x.dim() < 1 or x.shape[-1] != k or x.dtype not in _INPUTS or not x.is_cpu:
        got = f"{x.dtype} {list(x.shape)} on {x.device}"
        raise ValueError(f"packed_linear: x: expected float32 or bfloat16 [..., {k}] on the CPU, got {got}")
    if bias is not None and (bias.shape != (n,) or bias.dtype not in _FLOATS):
        raise ValueError(f"packed_linear: bias: expected floats [{n}], got {bias.dtype} {list(bias.shape)}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("packed_linear: x: expected one that requires no gradient; train on ops.linear")
    arguments = (packed.data, packed.scales, packed.format, packed.group, n, bias)
    if x.dim() == 2:
        return _packed_linear(x, *arguments)  # type: ignore[no-any-return]
    rows = x.reshape(-1, k) if k else x.new_empty(x.shape[:-1].numel(), 0)
    return _packed_linear(rows, *arguments).view(*x.shape[:-1], n)  # type: ignore[no-any-return]


def _stored(format: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(format, torch.int8)


def _packable(weight: Tensor) -> bool:
    return weight.dtype in _FLOATS and weight.is_cpu


# --- the op -----------------------------------------------------------------------------------------------------------


def _native(x: Tensor, data: Tensor, scales: Tensor, format: str, group: int, n: int, bias: Tensor | None) -> Tensor:
    out = x.new_empty(x.shape[0], n)
    _C.packed_linear(
        x.contiguous(), format, group, data, scales, None if bias is None else bias.float().contiguous(), out
    )
    return out


def _fake(x: Tensor, data: Tensor, scales: Tensor, format: str, group: int, n: int, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], n)


_CUDA_IS = Implementation("none", "weights are packed for the CPU")
_packed_linear = define(
    "packed_linear(Tensor x, Tensor data, Tensor scales, str format, int group, SymInt n, Tensor? bias) -> Tensor",
    fake=_fake,
    cpu=_native,
    cuda_is=_CUDA_IS,
)
record("pack_weight", cpu=Implementation("native", "C++ kernel"), cuda=_CUDA_IS)
