"""Drawing tokens against plain torch (softmax and multinomial; a full sort for top-p; topk for top-k).

Logits are normal with standard deviation 3, which leaves a flat tail: hard for top-p. The gate: both contestants'
frequencies agree on a small vocabulary within sampling error. ``extra_info`` holds rows per second.
"""

from __future__ import annotations

import math

import pytest
import torch

from fastsft import _C, ops

FILTERS = {
    "greedy": {"temperature": 0.0},
    "temperature 0.8": {"temperature": 0.8},
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "top-k 50, top-p 0.9": {"top_k": 50, "top_p": 0.9},
}


def fastsft(logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    rows = len(logits)
    return ops.sample(
        logits,
        temperature=torch.full((rows,), temperature),
        top_k=torch.full((rows,), top_k, dtype=torch.int32),
        top_p=torch.full((rows,), top_p),
        min_p=torch.zeros(rows),
        seeds=torch.zeros(rows, dtype=torch.int64),
        positions=torch.arange(rows),
    )[0]


def plain_torch(logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    torch.log_softmax(logits, -1)  # fastsft returns log-probabilities too
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        share = ordered.softmax(-1)
        drop = share.cumsum(-1) - share >= top_p
        logits = logits.scatter(-1, order, ordered.masked_fill(drop, -math.inf))
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]


def gate(options: dict[str, float]) -> None:
    count, vocab = 20_000, 64
    logits = (torch.arange(vocab) * 27 % 64 / 8.0).expand(count, -1).contiguous()
    torch.manual_seed(0)
    ours, theirs = (torch.bincount(f(logits, **options), minlength=vocab) / count for f in (fastsft, plain_torch))
    assert (ours - theirs).abs().max() < 5 * math.sqrt(0.5 / count)


@pytest.mark.parametrize("contestant", ["fastsft", "torch"])
@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 151_936), (16, 32_000)])
def test_sample(benchmark, rows, vocab, filters, contestant):
    torch.set_num_threads(_C.num_threads())
    gate(FILTERS[filters])
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)) * 3
    benchmark.group = f"sample [{rows}, {vocab}] {filters}"
    benchmark({"fastsft": fastsft, "torch": plain_torch}[contestant], logits, **FILTERS[filters])
    benchmark.extra_info["rows_per_second"] = rows / benchmark.stats["median"]
