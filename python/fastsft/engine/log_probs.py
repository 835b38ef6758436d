"""Log-probabilities with an engine's values and the training kernels' gradients.

Shape suffixes: T packed tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from fastsft import ops
from fastsft.models.attend import VarlenAttend
from fastsft.models.decoder import Decoder

_IGNORE = -100


class PackedBatch(Protocol):
    """Documents end to end on one axis of T tokens, as ``fastsft.data.batch.collate`` lays them out."""

    @property
    def ids(self) -> Tensor:
        """int64 [T]."""

    @property
    def position_ids(self) -> Tensor:
        """int64 [T], from 0 in each document."""

    @property
    def targets(self) -> Tensor:
        """int64 [T], of each token the next one of its document, or -100."""

    @property
    def cu_seqlens(self) -> Tensor:
        """int32 [B + 1]."""


def log_probs(score: Callable[[list[Any]], list[list[float]]], model: Decoder, batch: PackedBatch) -> Tensor:
    """Arguments and result: :meth:`fastsft.LLM.log_probs`, whose :meth:`~fastsft.LLM.score` is ``score``."""
    _check(batch)
    values_T = _values(score, batch)
    if not torch.is_grad_enabled():
        return values_T
    hidden_TD = model(batch.ids, batch.position_ids, VarlenAttend(batch.cu_seqlens))
    return cast(Tensor, ops.linear_logprobs(hidden_TD, model.lm_head_weight, batch.targets, values=values_T))


def _values(score: Callable[[list[Any]], list[list[float]]], batch: PackedBatch) -> Tensor:
    """float32 [T]: each document with targets is scored up to the last of them."""
    kept_T = (batch.targets != _IGNORE).cpu()
    ids, spans = batch.ids.tolist(), []
    for begin, end in itertools.pairwise(batch.cu_seqlens.tolist()):
        if len(rows := kept_T[begin:end].nonzero()):
            spans.append((begin, begin + int(rows[-1]) + 1))
    values_T = torch.zeros(len(kept_T), dtype=torch.float32, device="cpu")
    scores = score([{"prompt_token_ids": ids[begin : end + 1]} for begin, end in spans])
    for (begin, end), found in zip(spans, scores, strict=True):
        values_T[begin:end] = torch.tensor(found, dtype=torch.float32, device="cpu")
    return torch.where(kept_T, values_T, 0.0).to(batch.targets.device)


def _check(batch: PackedBatch) -> None:
    """Raise a ValueError for targets or positions that are not those of the engine."""
    bounds = batch.cu_seqlens.long()
    lengths = bounds.diff()
    if not len(bounds) or bounds[0] != 0 or bounds[-1] != len(batch.ids) or (lengths < 0).any():
        got = batch.cu_seqlens.tolist()
        raise ValueError(f"log_probs: batch: cu_seqlens: expected 0 to {len(batch.ids)}, not falling, got {got!r:.200}")
    places = torch.arange(len(batch.ids), device=bounds.device) - bounds[:-1].repeat_interleave(lengths)
    next_ids = batch.ids.roll(-1)
    next_ids[bounds[1:][lengths > 0] - 1] = _IGNORE
    expected = torch.where(batch.targets == _IGNORE, _IGNORE, next_ids)
    for name, got_T, expected_T in (("position_ids", batch.position_ids, places), ("targets", batch.targets, expected)):
        if (wrong := (got_T != expected_T).nonzero()).numel():
            t = int(wrong[0])
            raise ValueError(f"log_probs: batch: {name}[{t}]: expected {int(expected_T[t])}, got {int(got_T[t])}")
