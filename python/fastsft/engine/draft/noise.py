"""Guesses drawn as the tokens are that they stand for: with the same parameters and the same noise."""

from __future__ import annotations

import torch

from fastsft import ops
from fastsft.engine.sequence import Sequence


def draw_alike(sequence: Sequence, logits_KV: torch.Tensor, place: int) -> list[int]:
    """Guesses at the K tokens of ``sequence`` from the one ``place`` places after its last on."""
    params, count = sequence.params, len(logits_KV)
    ids, _ = ops.sample(
        logits_KV,
        temperature=torch.full((count,), params.temperature, dtype=torch.float32),
        top_k=torch.full((count,), params.top_k, dtype=torch.int32),
        top_p=torch.full((count,), params.top_p, dtype=torch.float32),
        min_p=torch.full((count,), params.min_p, dtype=torch.float32),
        seeds=torch.full((count,), sequence.seed, dtype=torch.int64),
        positions=torch.arange(count) + sequence.generated + place,
    )
    found: list[int] = ids.tolist()
    return found
