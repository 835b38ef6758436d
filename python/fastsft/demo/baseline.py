"""The loop most people would write: padded batches, torch's attention, all logits, torch's cross-entropy.

Same weights, same samples in the same order, same optimizer and type as fastsft's own step, so that what differs is the
padding, the attention and the loss.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch.nn import functional

from fastsft.config import OptimOptions
from fastsft.data.batch import IGNORE, VarlenBatch
from fastsft.models.decoder import Decoder
from fastsft.train.evaluate import batch_loss
from fastsft.train.optim import MasterAdamW


@dataclass(frozen=True)
class Comparison:
    """Real (not padding) tokens per second, medians over alternating rounds, and the loss each computed."""

    ours: float
    padded: float
    loss_ours: float
    loss_padded: float
    padding_share: float

    @property
    def ratio(self) -> float:
        return self.ours / self.padded


class _PaddedAttend:
    """torch's scaled dot product over [B, S]: causal, so the padding behind a document changes nothing before it."""

    def __init__(self, batch: int, length: int) -> None:
        self._shape = (batch, length)

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: tuple[int, int] | None
    ) -> torch.Tensor:
        q, k, v = (x.view(*self._shape, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)


def _padded_loss(model: Decoder, batch: VarlenBatch, documents: list[int], normalizer: float) -> torch.Tensor:
    bounds = batch.cu_seqlens.tolist()
    length = max(bounds[d + 1] - bounds[d] for d in documents)
    ids = torch.zeros(len(documents), length, dtype=torch.int64)
    targets = torch.full((len(documents), length), IGNORE)
    for row, d in enumerate(documents):
        begin, end = bounds[d], bounds[d + 1]
        ids[row, : end - begin] = batch.ids[begin:end]
        targets[row, : end - begin] = batch.targets[begin:end]
    positions = torch.arange(length).repeat(len(documents))
    hidden = model(ids.flatten(), positions, _PaddedAttend(*ids.shape))
    logits = functional.linear(hidden, model.lm_head_weight).float()
    return functional.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum") / normalizer


def compare(model: Decoder, batches: list[VarlenBatch], *, rows: int, rounds: int) -> Comparison:
    """Train on the same batches both ways, alternating, starting from the same weights each time.

    Args:
        rows: documents per padded batch; a packed batch is split into as many of them as it needs.
    """
    start = {k: v.clone() for k, v in model.state_dict().items()}
    speeds: dict[str, list[float]] = {"ours": [], "padded": []}
    losses = {"ours": 0.0, "padded": 0.0}
    tokens = sum(b.num_tokens for b in batches)
    for round_number in range(rounds + 1):  # the first one warms up
        for way in ("ours", "padded"):
            model.load_state_dict(start)
            optimizer = MasterAdamW(model, OptimOptions(lr=1e-4))
            began = time.perf_counter()
            total = 0.0
            for batch in batches:
                weight = float(batch.weights.sum())
                parts = [None] if way == "ours" else _groups(batch, rows)
                for documents in parts:
                    if documents is None:
                        loss = batch_loss(model, batch, normalizer=weight)
                    else:
                        loss = _padded_loss(model, batch, documents, weight)
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.collect()
                    total += float(loss.detach())
                optimizer.step(1e-4, optimizer.grad_norm())
            losses[way] = total / len(batches)
            if round_number:
                speeds[way].append(tokens / (time.perf_counter() - began))
    model.load_state_dict(start)
    return Comparison(
        statistics.median(speeds["ours"]),
        statistics.median(speeds["padded"]),
        losses["ours"],
        losses["padded"],
        1 - tokens / sum(_padded_size(b, rows) for b in batches),
    )


def _groups(batch: VarlenBatch, rows: int) -> list[list[int]]:
    """Documents of a packed batch in random batches of ``rows``, as a data loader would draw them."""
    count = len(batch.cu_seqlens) - 1
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return [order[i : i + rows] for i in range(0, count, rows)]


def _padded_size(batch: VarlenBatch, rows: int) -> int:
    lengths = torch.diff(batch.cu_seqlens).tolist()
    return sum(len(g) * max(lengths[d] for d in g) for g in _groups(batch, rows))
