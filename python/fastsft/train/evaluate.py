"""Loss on held-out samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch

from fastsft import ops
from fastsft.data.batch import VarlenBatch
from fastsft.data.loader import sequential_packs
from fastsft.data.segments import Segment
from fastsft.data.store import SampleStore
from fastsft.models.attend import VarlenAttend
from fastsft.models.decoder import Decoder
from fastsft.train.losses import SEGMENTS, document_sums
from fastsft.train.parallel import Copies


@dataclass(frozen=True)
class EvalResult:
    """Mean negative log-likelihood per unit of token weight, in nats: of everything, and of the tokens of each
    source, segment and skill. ``tokens``: targets counted."""

    loss: float
    tokens: int
    sources: dict[str, float] = field(default_factory=dict)
    segments: dict[str, float] = field(default_factory=dict)
    skills: dict[str, float] = field(default_factory=dict)

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


def batch_logprobs(model: Decoder, batch: VarlenBatch) -> torch.Tensor:
    """float32 [T], the log-probability of each target of a packed batch, 0 where there is none; differentiable."""
    hidden_TD = model(batch.ids, batch.position_ids, VarlenAttend(batch.cu_seqlens))
    logprobs = ops.linear_logprobs(hidden_TD, model.lm_head_weight, batch.targets)
    return cast(torch.Tensor, logprobs)  # a tuple only with return_entropy


def evaluate_loss(
    model: Decoder,
    store: SampleStore,
    *,
    capacity: int,
    sources: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
    parallel: Copies | None = None,
) -> EvalResult | None:
    """Weighted mean loss over a store, packed into batches of at most ``capacity`` tokens; None for an empty store.

    Args:
        sources: the names of the samples' origins; none: the loss of each is not told.
        progress: called with (batches done, all).
        parallel: how several processes hold the model; they share the batches, and each gets the result.
    """
    parallel = parallel or Copies(model)
    sums = torch.zeros(len(store), len(Segment), 2, dtype=torch.float64)
    tokens = 0
    packs = sequential_packs(store, capacity=capacity)
    turns = parallel.turns(len(packs))
    with parallel.inference():
        for done, (number, counts) in enumerate(turns, 1):
            batch = store.batch(packs[number])
            logprobs = batch_logprobs(model, batch)
            if counts:
                sums[packs[number]] = document_sums(batch, logprobs)
                tokens += int((batch.weights > 0).sum())
            if progress:
                progress(done, len(turns))
    parallel.world.sum_([sums])
    tokens = sum(parallel.world.gather(tokens))
    if not tokens:
        return None
    return EvalResult(
        _mean(sums),
        tokens,
        _means((name, sums[torch.from_numpy(store.origins == i)]) for i, name in enumerate(sources)),
        _means(zip(SEGMENTS, sums.unbind(1), strict=True)),
        _means((skill, sums[numbers]) for skill, numbers in sorted(_by_skill(store).items())),
    )


def _by_skill(store: SampleStore) -> dict[str, list[int]]:
    """The numbers of the samples with each skill."""
    found: dict[str, list[int]] = {}
    for number, skills in enumerate(store.skills):
        for skill in dict.fromkeys(skills):
            found.setdefault(skill, []).append(number)
    return found


def _means(groups: Iterable[tuple[str, torch.Tensor]]) -> dict[str, float]:
    """Of the groups that have a weight."""
    return {name: _mean(sums) for name, sums in groups if sums[..., 1].any()}


def _mean(sums: torch.Tensor) -> float:
    nll, weight = sums.flatten(0, -2).sum(0).tolist()
    return float(nll / weight)
