"""packed_linear on the rows of a decoding step, against what torch has and against memory.

A round goes through several weights of 8192 x 8192 in turn, as a step goes through its layers: 256 MB or more, so that
every weight comes from memory. ``share_of_stream`` is the packed weights' bytes per second by the rate of summing a
large array; ``times_one_row`` is the time by that of one row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch

from fastsft import _C, ops
from fastsft.ops.matvec import PackedWeight

SIZE, GROUP, STREAM = 8192, 32, 256 << 20
Product = Callable[[torch.Tensor], torch.Tensor]


def plain(packed: PackedWeight, dtype: torch.dtype) -> Product:
    weight = packed.dequantize().to(dtype)
    return lambda x: torch.nn.functional.linear(x, weight)


def integers(packed: PackedWeight) -> torch.Tensor:
    values = torch.empty(packed.shape, dtype=torch.int8)
    _C.unpack_weight(packed.format, packed.data, values)
    return values


def int8_weight_only(packed: PackedWeight) -> Product:
    values, scales = integers(packed), packed.scales.flatten().bfloat16()
    return lambda x: torch.ops.aten._weight_int8pack_mm(x, values, scales)


def int8_dynamic(packed: PackedWeight) -> Product:
    """One scale for all of x."""
    scales = packed.scales.flatten()
    weight = torch._make_per_channel_quantized_tensor(integers(packed), scales, torch.zeros(SIZE, dtype=torch.int), 0)
    layout = torch.ops.quantized.linear_prepack(weight, None)
    return lambda x: torch.ops.quantized.linear_dynamic(x, layout, False)


def int4_weight_only(packed: PackedWeight) -> Product:
    scales = packed.scales.transpose(1, 2).flatten(0, 1)  # [N, groups]
    layout = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers(packed).int() + 8, 8)
    zeros = torch.stack([scales, torch.zeros_like(scales)], -1).transpose(0, 1).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, layout, GROUP, zeros)


def fastsft(packed: PackedWeight) -> Product:
    mine = dataclasses.replace(packed, data=packed.data.clone(), scales=packed.scales.clone())
    return lambda x: ops.packed_linear(x, mine)


# By format: who takes part, in what type of x.
CONTESTANTS: dict[str, dict[str, tuple[Callable[[PackedWeight], Product], torch.dtype]]] = {
    "float32": {
        "fastsft": (fastsft, torch.float32),
        "F.linear": (lambda packed: plain(packed, torch.float32), torch.float32),
    },
    "bfloat16": {
        "fastsft": (fastsft, torch.bfloat16),
        "F.linear": (lambda packed: plain(packed, torch.bfloat16), torch.bfloat16),
    },
    "int8": {
        "fastsft": (fastsft, torch.bfloat16),
        "torch._weight_int8pack_mm": (int8_weight_only, torch.bfloat16),
    },
    "int4": {
        "fastsft": (fastsft, torch.bfloat16),
        "torch._weight_int4pack_mm_for_cpu": (int4_weight_only, torch.bfloat16),
    },
    "w8a8": {
        "fastsft": (fastsft, torch.bfloat16),
        "torch quantized.linear_dynamic": (int8_dynamic, torch.float32),
    },
}


@functools.lru_cache(maxsize=1)
def pack(format: str) -> PackedWeight:
    weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return ops.pack_weight(weight, format, group=GROUP)


@functools.lru_cache(maxsize=1)
def stream(format: str, contestant: str) -> list[Product]:
    packed = pack(format)
    return [CONTESTANTS[format][contestant][0](packed) for _ in range(-(-STREAM // packed.nbytes))]


@functools.lru_cache(maxsize=1)
def expected(format: str, rows: int) -> torch.Tensor:
    return inputs(rows) @ pack(format).dequantize().T


def inputs(rows: int) -> torch.Tensor:
    return torch.randn(rows, SIZE, generator=torch.Generator().manual_seed(1)).bfloat16().float()


ONE_ROW: dict[tuple[str, str, int], float] = {}
PAIRS = [(format, contestant) for format, contestants in CONTESTANTS.items() for contestant in contestants]


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(("format", "contestant"), PAIRS)
def test_packed_linear(benchmark, limits, format, contestant, rows, threads):
    products = stream(format, contestant)
    x = inputs(rows).to(CONTESTANTS[format][contestant][1])
    exact = expected(format, rows)
    error = (products[0](x).float() - exact).norm() / exact.norm()
    assert error <= (1e-5 if format == "float32" else 0.02)  # roundings to bfloat16, and x in 8 bits

    def layers(x: torch.Tensor) -> None:
        for product in products:
            product(x)

    weights = f"{len(products)} weights [{SIZE}, {SIZE}]"
    benchmark.group = f"packed_linear {format}: [{rows}, {SIZE}] x {weights}, threads: {threads}"
    benchmark.pedantic(layers, (x,), rounds=15, warmup_rounds=1)
    median = benchmark.stats["median"]
    key = (format, contestant, threads)
    if rows == 1:
        ONE_ROW[key] = median
    if key in ONE_ROW:
        benchmark.extra_info["times_one_row"] = median / ONE_ROW[key]
    benchmark.extra_info["relative_error"] = float(error)
    if contestant == "fastsft":
        read = len(products) * pack(format).nbytes
        benchmark.extra_info["gigabytes_per_second"] = read / median / 1e9
        limits.share_bytes(benchmark, read=read)
