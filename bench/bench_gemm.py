"""The matrix products of linear layers against torch.mm: forward, and backward into the input and the weight.

Shapes of a 30 M and a 120 M decoder on a packed batch of 2,048 tokens, and of the head on one tile of rows. The gate:
both contestants agree within the rounding of the type and of the float32 sums. ``extra_info`` holds the rate.
"""

from __future__ import annotations

import pytest
import torch

from fastsft.ops.gemm import product

SHAPES = {  # rows, inputs, outputs
    "30M attention": (2048, 512, 512),
    "30M MLP in": (2048, 512, 1408),
    "30M MLP out": (2048, 1408, 512),
    "120M attention": (2048, 768, 768),
    "120M MLP in": (2048, 768, 2560),
    "120M MLP out": (2048, 2560, 768),
    "head": (1024, 768, 32_768),
}


def fastsft(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return product(a, b, out)


def torch_mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return torch.mm(a, b, out=out)


CONTESTANTS = {"fastsft": fastsft, "torch.mm": torch_mm}


def operands(way: str, shape: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, inputs, outputs = SHAPES[shape]
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=g).to(dtype)
    weight = torch.randn(outputs, inputs, generator=g).to(dtype)
    grad = torch.randn(rows, outputs, generator=g).to(dtype)
    a, b = {"forward": (x, weight.t()), "to the input": (grad, weight), "to the weight": (grad.t(), x)}[way]
    return a, b, torch.empty(a.shape[0], b.shape[1], dtype=dtype)


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("way", ["forward", "to the input", "to the weight"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_linear(benchmark, limits, dtype, shape, way, contestant):
    a, b, out = operands(way, shape, dtype)
    ours, theirs = (f(a, b, torch.empty_like(out)).float() for f in (fastsft, torch_mm))
    rounding = torch.finfo(dtype).eps + a.shape[1] ** 0.5 * torch.finfo(torch.float32).eps
    assert (ours - theirs).abs().max() <= rounding * theirs.abs().max()
    benchmark.group = f"linear {way}, {shape}, {dtype}"
    benchmark.pedantic(CONTESTANTS[contestant], (a, b, out), rounds=7, warmup_rounds=1)
    work = 2 * a.shape[0] * a.shape[1] * b.shape[1]
    benchmark.extra_info["GFLOP/s"] = work / benchmark.stats["median"] / 1e9
    limits.share_flops(benchmark, work, dtype)
