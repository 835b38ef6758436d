"""Loss on held-out samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch

from fastsft import ops
from fastsft.data.batch import VarlenBatch
from fastsft.data.loader import sequential_packs
from fastsft.data.store import SampleStore
from fastsft.models.attend import VarlenAttend
from fastsft.models.decoder import Decoder


@dataclass(frozen=True)
class EvalResult:
    """Mean negative log-likelihood per unit of token weight, in nats. ``tokens``: targets counted."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


def batch_loss(model: Decoder, batch: VarlenBatch, *, normalizer: float) -> torch.Tensor:
    """sum_t weight_t * nll_t / normalizer over one packed batch; float32, differentiable."""
    hidden_TD = model(batch.ids, batch.position_ids, VarlenAttend(batch.cu_seqlens))
    loss = ops.linear_cross_entropy(
        hidden_TD, model.lm_head_weight, batch.targets, batch.weights, normalizer=normalizer
    )
    return cast(torch.Tensor, loss)  # a tuple only with return_aux


@torch.inference_mode()
def evaluate_loss(
    model: Decoder, store: SampleStore, *, capacity: int, progress: Callable[[int, int], None] | None = None
) -> EvalResult | None:
    """Weighted mean loss over a store, packed into batches of at most ``capacity`` tokens; None for an empty store.

    ``progress`` is called with (batches done, all).
    """
    total = weight = 0.0
    tokens = 0
    packs = sequential_packs(store, capacity=capacity)
    for done, members in enumerate(packs, 1):
        batch = store.batch(members)
        total += float(batch_loss(model, batch, normalizer=1.0))
        weight += float(batch.weights.sum(dtype=torch.float64))
        tokens += int((batch.weights > 0).sum())
        if progress:
            progress(done, len(packs))
    return EvalResult(total / weight, tokens) if tokens else None
