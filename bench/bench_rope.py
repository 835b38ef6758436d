"""apply_rope, forward and backward, against the eager formula."""

from __future__ import annotations

import pytest
import torch
from shapes import layer_step

from fastsft import ops
from fastsft.ops import reference

CONTESTANTS = {"fastsft": ops.apply_rope, "eager": reference.apply_rope}


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_rope(benchmark, limits, dtype, contestant):
    angle = torch.rand(4096, 32)
    inputs = [torch.randn(4096, 14, 64).to(dtype), angle.cos().to(dtype), angle.sin().to(dtype)]
    layer_step(
        benchmark,
        limits,
        f"apply_rope fwd+bwd [4096, 14, 64] {dtype}",
        CONTESTANTS,
        contestant,
        inputs,
        passes=4,
        constants=2,
    )
