"""Generation: one token per sequence and step, memory-bound."""

from __future__ import annotations

import torch

from fastsft.engine.blocks import KVCache
from fastsft.engine.request import Sequence
from fastsft.engine.runner import Inputs, hidden_states, logits
from fastsft.models.decoder import Decoder


def decode(model: Decoder, cache: KVCache, sequences: list[Sequence]) -> torch.Tensor:
    """Advance every sequence by its last token; next-token logits [B, V]."""
    inputs = Inputs.build([(s, 1) for s in sequences], cache.block_size)
    hidden_BD = hidden_states(model, cache, inputs)
    for sequence in sequences:
        sequence.computed += 1
    return logits(model, hidden_BD)
