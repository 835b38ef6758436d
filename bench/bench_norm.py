"""rms_norm, forward and backward, against the eager formula of the published models and torch's own rms_norm."""

from __future__ import annotations

import pytest
import torch
from shapes import layer_step

from fastsft import ops
from fastsft.ops import reference

CONTESTANTS = {
    "fastsft": ops.rms_norm,
    "eager": reference.rms_norm,
    "torch.nn.functional.rms_norm": lambda x, w: torch.nn.functional.rms_norm(x, w.shape, w, 1e-6),
}


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_norm(benchmark, limits, dtype, contestant):
    inputs = [torch.randn(4096, 896).to(dtype), torch.ones(896, dtype=dtype)]
    layer_step(benchmark, limits, f"rms_norm fwd+bwd [4096, 896] {dtype}", CONTESTANTS, contestant, inputs, passes=5)
