"""Linear layers of a step on a device: a weight as it is or quantised, and its product with the step's rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsft.ops._library import on_device, triton_or
from fastsft.ops._loss_products import HAS_WIDE_RESULTS, multiply_cuda
from fastsft.ops._registry import Implementation, record
from fastsft.ops.gemm import linear

FORMATS = ("float32", "bfloat16", "int8", "int4")
_FEW_ROWS = 64  # more are no longer bound by the weight's bytes: the weight is widened, for cuBLAS
_TILE = 1 << 25  # numbers that are widened, or summed, at a time: 64 MiB in 16 bits, 128 MiB in float32


@dataclass(frozen=True)
class DeviceWeight:
    """A weight [N, K] as :func:`hold_weight` leaves it."""

    format: str
    shape: tuple[int, int]
    group: int  # of int4: input channels that share a scale; 0 otherwise
    data: Tensor
    """Floats or int8 [N, K]; int4: uint8 [N, groups * group / 2], byte i of a group with numbers i and i + group / 2
    plus 8 in its low and high bits."""
    scales: Tensor
    """int8: float32 [N]; int4: bfloat16 [N, groups]; otherwise empty."""

    @property
    def nbytes(self) -> int:
        """What a product reads."""
        return self.data.nbytes + self.scales.nbytes

    def widened(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """[N, K] of a type, or some rows of it: the numbers of int8 without their scales, which belong to the result;
        otherwise the weight that this stands for, rounded."""
        data = self.data[rows]
        if self.format != "int4":
            return data.to(dtype)
        pairs = data.view(len(data), -1, self.group // 2)
        numbers = torch.cat([pairs & 15, pairs >> 4], 2).to(dtype).sub_(8)
        return numbers.mul_(self.scales[rows].to(dtype)[:, :, None]).flatten(1)[:, : self.shape[1]]


def hold_weight(
    weight: Sequence[Tensor],
    format: str,
    device: torch.device,
    *,
    group: int = 32,
    out: DeviceWeight | None = None,
) -> DeviceWeight:
    """Stack weights along N in the memory of a device, rounded as ``ops.pack_weight`` rounds them.

    Args:
        weight: floats [N_i, K], wherever they are.
        format: "float32", "bfloat16", "int8" or "int4".
        device: where the result is.
        group: 32 or 64; for int4 only.
        out: a weight of the same shape, format and group, whose memory is written and which is returned.

    Raises:
        ValueError: an unknown format or group, shapes that do not fit each other or ``out``, or a NaN or infinity to be
            quantised (``out`` is then undefined).
    """
    if format not in FORMATS:
        raise ValueError(f"hold_weight: format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if group not in (32, 64):
        raise ValueError(f"hold_weight: group: expected 32 or 64, got {group}")
    shapes = [list(w.shape) for w in weight]
    if not shapes or any(len(s) != 2 or s[1] != shapes[0][1] for s in shapes):
        raise ValueError(f"hold_weight: weight: expected [N, K] each, with one K, got {shapes}")
    n, k = sum(s[0] for s in shapes), shapes[0][1]
    mine = (format, (n, k), group if format == "int4" else 0)
    if out is None:
        out = DeviceWeight(*mine, *_empty(format, n, k, group, device))
    if (out.format, out.shape, out.group) != mine:
        got = f"{out.format} {list(out.shape)}, group {out.group}"
        raise ValueError(f"hold_weight: out: expected {format} {[n, k]}, group {mine[2]}, got {got}")
    begin = 0
    for part in weight:
        rows = slice(begin, begin + len(part))
        if format in ("float32", "bfloat16"):
            out.data[rows].copy_(part)
        else:
            into = out.data[rows], out.scales[rows]
            for tile in _tiles(len(part), k):
                wide = part[tile].to(device).float()
                data, scales = _int8(wide) if format == "int8" else _int4(wide, group)
                if not bool(scales.isfinite().all()):
                    raise ValueError(f"hold_weight: weight: expected finite numbers for {format}, got others")
                into[0][tile], into[1][tile] = data, scales
        begin = rows.stop
    return out


def _empty(format: str, n: int, k: int, group: int, device: torch.device) -> tuple[Tensor, Tensor]:
    def new(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    if format == "int8":
        return new(n, k, dtype=torch.int8), new(n, dtype=torch.float32)
    if format == "int4":
        groups = -(-k // group)
        return new(n, groups * group // 2, dtype=torch.uint8), new(n, groups, dtype=torch.bfloat16)
    return new(n, k, dtype=getattr(torch, format)), new(0, dtype=torch.float32)


def _int8(w: Tensor) -> tuple[Tensor, Tensor]:
    scale = w.abs().amax(1) / 127
    return (w / scale[:, None]).round().clamp(-127, 127).nan_to_num(0.0).to(torch.int8), scale


def _int4(w: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The number of greatest magnitude in a group becomes -8."""
    parts = torch.nn.functional.pad(w, (0, -w.shape[1] % group)).view(len(w), -(-w.shape[1] // group), group)
    low, high = parts.amin(2), parts.amax(2)
    scale = (torch.where(high > -low, high, low) / -8).bfloat16()
    numbers = (parts / scale.float()[:, :, None]).round().clamp(-8, 7).nan_to_num(0.0)
    first, second = (numbers + 8).to(torch.uint8).chunk(2, 2)
    return (first | second << 4).flatten(1), scale


def device_linear(x: Tensor, weight: DeviceWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: x [T, K], bias [N] of x's type; [T, N] in it, rounded once."""
    if weight.format in ("float32", "bfloat16"):
        return linear(x, weight.data, bias)
    out = x.new_empty(len(x), weight.shape[0])
    _quantised(x, weight, bias, out)
    return out


def device_logits(x: Tensor, weight: DeviceWeight, out: Tensor) -> None:
    """``out`` float32 [T, N] becomes ``x @ weight.T``, on a GPU not rounded to x's type: draws are made of it."""
    if weight.format in ("float32", "bfloat16"):
        _multiply(x, weight.data, out)
    else:
        _quantised(x, weight, None, out)


def _quantised(x: Tensor, weight: DeviceWeight, bias: Tensor | None, out: Tensor) -> None:
    if x.is_cuda and len(x) <= _FEW_ROWS:
        _few_rows(x, weight.data, weight.scales, weight.group, bias, out)
    else:
        widened_product(x, weight.data, weight.scales, weight.group, bias, out)


def widened_product(x: Tensor, data: Tensor, scales: Tensor, group: int, bias: Tensor | None, out: Tensor) -> None:
    """``out`` becomes ``x @ weight.T + bias`` by products of floats, for many rows; ``group`` 0: int8.

    The weight is widened in tiles: with x [M, K] in 16 bits, M and K up to 131,072, that takes at most 192 MiB.
    """
    format = "int4" if group else "int8"
    weight = DeviceWeight(format, (len(data), x.shape[1]), group, data, scales)
    for tile in _tiles(len(data), max(x.shape)):
        _widened_tile(x, weight, tile, bias, out)


def _widened_tile(x: Tensor, weight: DeviceWeight, tile: slice, bias: Tensor | None, out: Tensor) -> None:
    widened = weight.widened(x.dtype, tile)
    sums = torch.empty(len(x), len(widened), dtype=torch.float32, device=out.device)
    _multiply(x, widened, sums)
    if not weight.group:
        sums *= weight.scales[tile]
    if bias is not None:
        sums += bias[tile]
    out[:, tile].copy_(sums)


def _multiply(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """``out`` float32 = ``x @ weight.T``."""
    if x.is_cuda and (x.dtype == torch.float32 or HAS_WIDE_RESULTS):
        multiply_cuda(x, weight.t(), out)
        return
    wide = x.float()  # cuBLAS through torch before 2.8 rounds results to the type of x
    for tile in _tiles(len(weight), max(x.shape)):
        out[:, tile].copy_(linear(wide, weight[tile].float()))


def _tiles(count: int, each: int) -> Iterator[slice]:
    """Rows [begin, end) of ``count`` with ``each`` numbers: as even as multiples of 256 are, each of about a tile."""
    number = -(-count * each // _TILE) or 1
    step = max(256, -(-count // number // 256) * 256)
    return (slice(begin, min(begin + step, count)) for begin in range(0, count, step))


_product = triton_or(widened_product, "device_linear", "product")
_few_rows = on_device(_product["cuda"])
record(
    "device_linear", cpu=Implementation("torch", "for tests: the CPU's engine packs weights"), cuda=_product["cuda_is"]
)
