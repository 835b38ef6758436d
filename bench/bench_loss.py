"""Linear cross-entropy, forward and backward, against the plain projection with F.cross_entropy.

The head of a 0.5 B model (H 896, V 32,768), 1,024 rows, a part of them masked. The gate: losses agree before
anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from fastsft import ops

TOKENS, HIDDEN, VOCAB = 1024, 896, 32_768


class Head:
    def __init__(self, dtype: torch.dtype, masked: float) -> None:
        g = torch.Generator().manual_seed(0)
        self.hidden = (torch.randn(TOKENS, HIDDEN, generator=g) * 0.5).to(dtype).requires_grad_()
        self.weight = (torch.randn(VOCAB, HIDDEN, generator=g) * 0.05).to(dtype).requires_grad_()
        self.targets = torch.randint(VOCAB, (TOKENS,), generator=g)
        self.targets[torch.rand(TOKENS, generator=g) < masked] = -100

    def step(self, loss: Callable[[Head], torch.Tensor]) -> float:
        self.hidden.grad = self.weight.grad = None
        value = loss(self)
        value.backward()
        return float(value)


def fastsft(head: Head) -> torch.Tensor:
    return ops.linear_cross_entropy(head.hidden, head.weight, head.targets)


def fastsft_dft(head: Head) -> torch.Tensor:
    return ops.linear_cross_entropy(head.hidden, head.weight, head.targets, objective="dft")


def plain_torch(head: Head) -> torch.Tensor:
    logits = functional.linear(head.hidden, head.weight).float()
    return functional.cross_entropy(logits, head.targets)


CONTESTANTS = {"fastsft": fastsft, "fastsft dft": fastsft_dft, "F.linear + F.cross_entropy": plain_torch}


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("masked", [0.0, 0.33, 0.6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_loss(benchmark, dtype, masked, contestant):
    head = Head(dtype, masked)
    assert head.step(fastsft) == pytest.approx(head.step(plain_torch), rel=2e-2 if dtype == torch.bfloat16 else 1e-5)
    benchmark.group = f"linear_cross_entropy fwd+bwd {dtype}, {masked:.0%} masked"
    benchmark.pedantic(head.step, (CONTESTANTS[contestant],), rounds=5, warmup_rounds=1)
    kept = int((head.targets != -100).sum())
    benchmark.extra_info["gflops"] = 6 * kept * HIDDEN * VOCAB / benchmark.stats["median"] / 1e9
