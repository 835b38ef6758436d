"""How much arithmetic a step needs, and how much this machine can do: what MFU and time estimates stand on."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fastsft.data.batch import VarlenBatch
from fastsft.models.decoder import Decoder
from fastsft.ops import linear


@dataclass(frozen=True)
class Arithmetic:
    """Floating-point operations of a training step, forward and backward, that no implementation can do without.

    Of a trained matrix 6 per element and row (PaLM, arXiv 2204.02311, appendix B), of a frozen one 4: it needs no
    gradient. Rows of the head are the targets with a weight, the other rows are not projected. Attention counts the
    pairs that the causal mask and the window let see each other; what is recomputed counts for nothing.
    """

    per_token: int
    per_target: int
    per_pair: tuple[tuple[int, int | None], ...]
    """Of each layer: operations of a pair of query and key, and how many keys before itself a query sees."""

    @classmethod
    def of(cls, model: Decoder) -> Arithmetic:
        matrices = [p for p in model.layers.parameters() if p.ndim == 2]
        head = model.lm_head_weight
        config = model.config
        pair = 12 * config.num_attention_heads * config.head_dim
        return cls(
            sum((6 if p.requires_grad else 4) * p.numel() for p in matrices),
            (6 if head.requires_grad else 4) * head.numel(),
            tuple((pair, window[0] if window and window[0] >= 0 else None) for window in config.windows),
        )

    def flops(self, lengths: npt.NDArray[np.int64], targets: int) -> int:
        """Of documents of these lengths with so many targets."""
        pairs = sum(per_pair * _pairs(lengths, window) for per_pair, window in self.per_pair)
        return self.per_token * int(lengths.sum()) + self.per_target * targets + pairs

    def flops_of(self, batches: Sequence[VarlenBatch]) -> int:
        lengths = [np.diff(b.cu_seqlens.numpy().astype(np.int64)) for b in batches]
        return self.flops(np.concatenate(lengths), sum(int((b.weights != 0).sum()) for b in batches))


def _pairs(lengths: npt.NDArray[np.int64], window: int | None) -> int:
    if window is None:
        return int((lengths * (lengths + 1) // 2).sum())
    full = np.minimum(lengths, window + 1)  # queries that see everything before them
    return int((full * (full + 1) // 2 + (lengths - full) * (window + 1)).sum())


@functools.cache
def matmul_rate(dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of this machine's matrix product with the threads that torch has now: the best of the runs that fit into
    the time, at least two."""
    m, n = 1024, 2048
    x, weight = torch.ones(m, n, dtype=dtype), torch.ones(n, n, dtype=dtype)
    best, spent, runs = float("inf"), 0.0, 0
    with torch.inference_mode():
        while spent < seconds or runs < 2:
            began = time.perf_counter()
            linear(x, weight)
            took = time.perf_counter() - began
            best, spent, runs = min(best, took), spent + took, runs + 1
    return 2 * m * n * n / best
