"""Linear cross-entropy, forward and backward: against the projection with F.cross_entropy, as trainers write it (logits
upcast to float32) and in the logits' own type, and against torch's chunked F.linear_cross_entropy at its best setting.

The head of a 0.5 B model (H 896), 1,024 rows, a part of them masked. The gate: losses agree before anything is timed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from fastsft import ops
from fastsft.bench.limits import Limits
from fastsft.ops import _loss_products

TOKENS, HIDDEN, VOCAB, LARGE = 1024, 896, 32_768, 151_936
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


class Head:
    def __init__(self, dtype: torch.dtype, masked: float, vocab: int = VOCAB) -> None:
        g = torch.Generator().manual_seed(0)
        self.hidden = (torch.randn(TOKENS, HIDDEN, generator=g) * 0.5).to(dtype).requires_grad_()
        self.weight = (torch.randn(vocab, HIDDEN, generator=g) * 0.05).to(dtype).requires_grad_()
        self.targets = torch.randint(vocab, (TOKENS,), generator=g)
        self.targets[torch.rand(TOKENS, generator=g) < masked] = -100
        self.cu_seqlens = torch.arange(0, TOKENS + 1, 128, dtype=torch.int32)
        logits = functional.linear(self.hidden.detach(), self.weight.detach()).float()
        logprobs = torch.log_softmax(logits, -1).gather(1, self.targets.clamp(min=0)[:, None])[:, 0]
        self.ref = logprobs + 0.1 * torch.randn(TOKENS, generator=g)
        self.ref_head = (self.hidden.detach() + 0.01, self.weight.detach())

    def step(self, loss: Callable[[Head], torch.Tensor]) -> float:
        self.hidden.grad = self.weight.grad = None
        value = loss(self)
        value.backward()
        return float(value.detach())

    def flops(self) -> int:
        return 6 * int((self.targets != -100).sum()) * HIDDEN * self.weight.shape[0]


def fastsft(head: Head, **kw: Any) -> torch.Tensor:
    return ops.linear_cross_entropy(head.hidden, head.weight, head.targets, **kw)


def upcast(head: Head) -> torch.Tensor:
    logits = functional.linear(head.hidden, head.weight).float()
    return functional.cross_entropy(logits, head.targets)


def as_is(head: Head) -> torch.Tensor:
    return functional.cross_entropy(functional.linear(head.hidden, head.weight), head.targets)


CONTESTANTS: dict[str, Callable[[Head], torch.Tensor]] = {
    "fastsft": fastsft,
    "F.linear + float + F.cross_entropy": upcast,
    "F.linear + F.cross_entropy": as_is,
}
if hasattr(functional, "linear_cross_entropy"):  # torch >= 2.13

    def chunked(rows: int) -> Callable[[Head], torch.Tensor]:
        options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=rows, acc_policy="accurate")
        return lambda head: functional.linear_cross_entropy(head.hidden, head.weight, head.targets, options=options)

    # The setting torch chooses by itself, 32 rows, takes 20 times as long in bfloat16.
    for rows in (256, 512):
        CONTESTANTS[f"F.linear_cross_entropy, chunks of {rows}"] = chunked(rows)

OBJECTIVES: dict[str, Callable[[Head], dict[str, Any]]] = {
    "fastsft": lambda h: {},
    "fastsft, dft": lambda h: {"objective": "dft"},
    "fastsft, entropy_gate": lambda h: {"objective": "entropy_gate"},
    "fastsft, ratio_clip": lambda h: {"objective": "ratio_clip", "ref_logprobs": h.ref},
    "fastsft, pear_block": lambda h: {"objective": "pear_block", "ref_logprobs": h.ref, "cu_seqlens": h.cu_seqlens},
    "fastsft, iw_sequence": lambda h: {"objective": "iw_sequence", "ref_logprobs": h.ref, "cu_seqlens": h.cu_seqlens},
    "fastsft, asft (two heads: four products)": lambda h: {"objective": "asft", "reference": h.ref_head},
}


def compare(benchmark: Any, limits: Limits, head: Head, contestant: str) -> None:
    tolerance = 8e-2 if head.hidden.dtype == torch.bfloat16 else 1e-5  # torch may sum the losses in bfloat16
    assert head.step(fastsft) == pytest.approx(head.step(CONTESTANTS[contestant]), rel=tolerance)
    benchmark.pedantic(head.step, (CONTESTANTS[contestant],), rounds=5, warmup_rounds=1)
    benchmark.extra_info["GFLOP/s"] = head.flops() / benchmark.stats["median"] / 1e9
    limits.share_flops(benchmark, head.flops(), head.hidden.dtype)
    benchmark.extra_info["extra_mib"] = extra_memory(head, CONTESTANTS[contestant])


def extra_memory(head: Head, loss: Callable[[Head], torch.Tensor]) -> float:
    """MiB that a step takes at its peak beyond its inputs and the two gradients."""
    head.hidden.grad = head.weight.grad = None
    vars(_loss_products._kept).clear()  # what fastsft keeps from call to call counts
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    head.step(loss)
    gradients = sum(t.numel() * t.element_size() for t in (head.hidden, head.weight)) / 2**20
    return resident("VmHWM") - before - gradients


def resident(field: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("masked", [0.0, 0.33, 0.6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss(benchmark, limits, dtype, masked, contestant):
    benchmark.group = f"linear_cross_entropy fwd+bwd {dtype}, V {VOCAB}, {masked:.0%} masked"
    compare(benchmark, limits, Head(DTYPES[dtype], masked), contestant)


@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_large_vocabulary(benchmark, limits, contestant):
    benchmark.group = f"linear_cross_entropy fwd+bwd bf16, V {LARGE}, 33% masked"
    compare(benchmark, limits, Head(torch.bfloat16, 0.33, LARGE), contestant)


@pytest.mark.parametrize("contestant", OBJECTIVES)
def test_objectives(benchmark, contestant):
    head = Head(torch.bfloat16, 0.33)
    given = OBJECTIVES[contestant](head)
    benchmark.group = "objectives, fwd+bwd bf16, 33% masked, against nll"
    benchmark.pedantic(head.step, (lambda h: fastsft(h, **given),), rounds=9, warmup_rounds=1)
