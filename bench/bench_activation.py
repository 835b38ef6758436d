"""swiglu, forward and backward, against the eager formula."""

from __future__ import annotations

import pytest
import torch
from shapes import layer_step

from fastsft import ops
from fastsft.ops import reference

CONTESTANTS = {"fastsft": ops.swiglu, "eager": reference.swiglu}


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_swiglu(benchmark, limits, dtype, contestant):
    inputs = [torch.randn(4096, 2432).to(dtype), torch.randn(4096, 2432).to(dtype)]
    layer_step(benchmark, limits, f"swiglu fwd+bwd [4096, 2432] {dtype}", CONTESTANTS, contestant, inputs, passes=8)
