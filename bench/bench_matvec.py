"""packed_linear on the rows of a decoding step, against torch's products with the same weights and against memory.

A weight of 8192 x 8192, larger than the caches in every format; before each round another buffer is read, which empties
them. ``share_of_read`` is the packed weight's bytes per second by the rate of that reading (torch.sum) in the same
rounds, ``share_of_copy`` by that of torch's copy, read plus written. torch's int8 and int4 products take bfloat16 rows.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch

from fastsft import ops
from fastsft.ops.matvec import PackedWeight

SIZE, GROUP = 8192, 32
INPUT = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16, "int4": torch.bfloat16}
RIVALS = {
    "float32": "F.linear",
    "bfloat16": "F.linear",
    "int8": "torch._weight_int8pack_mm",
    "int4": "torch._weight_int4pack_mm_for_cpu",
}


def rival(format: str, packed: PackedWeight) -> Any:
    """torch's product with the weight that ``packed`` stands for."""
    weight = packed.dequantize()
    if format in ("float32", "bfloat16"):
        weight = weight.to(INPUT[format])
        return lambda x: torch.nn.functional.linear(x, weight)
    if format == "int8":
        scales = packed.scales.flatten()
        values, scales = (weight / scales[:, None]).round().to(torch.int8), scales.bfloat16()
        return lambda x: torch.ops.aten._weight_int8pack_mm(x, values, scales)
    scales = packed.scales.transpose(1, 2).flatten(0, 1)  # [N, groups]
    values = (weight / scales.float().repeat_interleave(GROUP, 1)).round().to(torch.int32) + 8
    layout = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 8)
    zeros = torch.stack([scales, torch.zeros_like(scales)], -1).transpose(0, 1).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, layout, GROUP, zeros)


@pytest.fixture(scope="module", params=list(INPUT))
def products(request: Any) -> tuple[str, int, dict[str, Any]]:
    weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    packed = ops.pack_weight(weight, request.param, group=GROUP)
    ours = lambda x: ops.packed_linear(x, packed)  # noqa: E731
    return request.param, packed.nbytes, {"fastsft": ours, "torch": rival(request.param, packed)}


@pytest.fixture(scope="module")
def buffer() -> torch.Tensor:
    return torch.ones(64 << 20)


@pytest.mark.parametrize("contestant", ["fastsft", "torch"])
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
def test_packed_linear(benchmark, products, buffer, rows, contestant):
    format, nbytes, contestants = products
    x = torch.randn(rows, SIZE, generator=torch.Generator().manual_seed(1)).to(INPUT[format])
    ours, theirs = (contestants[name](x).float() for name in ("fastsft", "torch"))
    # torch rounds the int8 and int4 scales, or the dequantised weight, to bfloat16
    assert (ours - theirs).norm() <= (1e-5 if format == "float32" else 0.02) * theirs.norm()
    reads: list[float] = []

    def empty_caches() -> tuple[tuple[torch.Tensor], dict[str, Any]]:
        start = time.perf_counter()
        buffer.sum()
        reads.append(buffer.nbytes / (time.perf_counter() - start))
        return (x,), {}

    copies: list[float] = []
    for _ in range(5):
        start = time.perf_counter()
        buffer[: len(buffer) // 2].copy_(buffer[len(buffer) // 2 :])
        copies.append(buffer.nbytes / (time.perf_counter() - start))
    benchmark.group = f"packed_linear {format} [{rows}, {SIZE}] x [{SIZE}, {SIZE}], torch: {RIVALS[format]}"
    benchmark.pedantic(contestants[contestant], setup=empty_caches, rounds=15, warmup_rounds=1)
    rate = nbytes / benchmark.stats["median"]
    benchmark.extra_info["gigabytes_per_second"] = rate / 1e9
    benchmark.extra_info["share_of_read"] = rate / statistics.median(reads)
    benchmark.extra_info["share_of_copy"] = rate / statistics.median(copies)
