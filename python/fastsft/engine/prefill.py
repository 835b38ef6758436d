"""Prompts: many tokens per sequence in one packed pass, compute-bound. Only a prompt's last row gets logits."""

from __future__ import annotations

import torch

from fastsft.engine.blocks import KVCache
from fastsft.engine.request import Sequence
from fastsft.engine.runner import Inputs, hidden_states, logits
from fastsft.models.decoder import Decoder


def prefill(
    model: Decoder, cache: KVCache, work: list[tuple[Sequence, int]]
) -> tuple[list[Sequence], torch.Tensor | None]:
    """Compute the given chunks.

    Returns:
        The sequences whose prompt is complete and their next-token logits [B, V], or no logits if none is.
    """
    inputs = Inputs.build(work, cache.block_size)
    hidden_TD = hidden_states(model, cache, inputs)
    complete, rows = [], []
    for i, (sequence, count) in enumerate(work):
        sequence.computed += count
        if sequence.computed == len(sequence.tokens):
            complete.append(sequence)
            rows.append(int(inputs.cu_seqlens[i + 1]) - 1)
    return complete, logits(model, hidden_TD[rows]) if rows else None
