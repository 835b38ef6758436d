"""Losses of a step by the source that tokens are from and by the segment that they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastsft.data.batch import VarlenBatch, documents
from fastsft.data.segments import Segment
from fastsft.ops.loss import LossAux

Sums = dict[tuple[int, int], tuple[float, float]]
"""By the numbers of a source and a segment: the weighted sum of the negative log-likelihood of their tokens, and that
of their weights. Groups whose weight is 0 are left out."""


def document_sums(batch: VarlenBatch, logprobs: torch.Tensor) -> torch.Tensor:
    """float64 [B, segments, 2]: as :data:`Sums` of each document's tokens of each segment.

    Args:
        logprobs: [T], of the targets.
    """
    group = documents(batch) * len(Segment) + batch.segments
    weights = batch.weights.double()
    values = torch.stack([-logprobs.double() * weights, weights], 1)
    sums = torch.zeros((len(batch.cu_seqlens) - 1) * len(Segment), 2, dtype=torch.float64)
    return sums.index_add_(0, group, values).view(-1, len(Segment), 2)


def by_group(batches: Sequence[tuple[VarlenBatch, LossAux]]) -> Sums:
    """Of the batches of a step."""
    return added([_of_batch(batch, aux) for batch, aux in batches])


def _of_batch(batch: VarlenBatch, aux: LossAux) -> Sums:
    origins = torch.tensor(batch.origins, dtype=torch.long)
    sums = torch.zeros(max(batch.origins, default=-1) + 1, len(Segment), 2, dtype=torch.float64)
    sums.index_add_(0, origins, document_sums(batch, aux.logprob))
    return {(o, s): (*sums[o, s].tolist(),) for o, s in (sums[..., 1] > 0).nonzero().tolist()}


def added(parts: Sequence[Sums]) -> Sums:
    """The sums of several parts of a step."""
    sums: Sums = {}
    for part in parts:
        for group, (nll, weight) in part.items():
            before = sums.get(group, (0.0, 0.0))
            sums[group] = (before[0] + nll, before[1] + weight)
    return sums


def by_origin(sums: Sums) -> dict[int, tuple[float, float]]:
    """The same of each source."""
    return _along(sums, 0)


def by_segment(sums: Sums) -> dict[int, tuple[float, float]]:
    """The same of each segment."""
    return _along(sums, 1)


def _along(sums: Sums, axis: int) -> dict[int, tuple[float, float]]:
    found: dict[int, tuple[float, float]] = {}
    for group, (nll, weight) in sorted(sums.items()):
        before = found.get(group[axis], (0.0, 0.0))
        found[group[axis]] = (before[0] + nll, before[1] + weight)
    return dict(sorted(found.items()))


def means(sums: dict[int, tuple[float, float]], names: Sequence[str]) -> dict[str, float]:
    """Mean negative log-likelihood per unit of weight, by name."""
    return {names[number]: nll / weight for number, (nll, weight) in sums.items()}


SEGMENTS = [segment.label for segment in Segment]
