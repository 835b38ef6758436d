"""Runs the decoder over the paged cache. Prefill and decode differ in what they ask for; this is what they share.

Shape suffixes: T tokens of the step, B sequences, D hidden size, V vocabulary, G key heads, K head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastsft import ops
from fastsft.engine.blocks import KVCache
from fastsft.engine.request import Sequence
from fastsft.models.decoder import Decoder


@dataclass(frozen=True)
class Inputs:
    """A step as tensors: each sequence's next tokens, where they stand, and where their keys and values go."""

    ids_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    cu_seqlens: torch.Tensor
    context_lens_B: torch.Tensor
    block_table: torch.Tensor

    @classmethod
    def build(cls, work: list[tuple[Sequence, int]], block_size: int) -> Inputs:
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        bounds, contexts = [0], []
        for sequence, count in work:
            begin, end = sequence.computed, sequence.computed + count
            ids += sequence.tokens[begin:end]
            positions += range(begin, end)
            slots += [sequence.blocks[p // block_size] * block_size + p % block_size for p in range(begin, end)]
            bounds.append(bounds[-1] + count)
            contexts.append(end)
        widest = max(len(s.blocks) for s, _ in work)
        table = [s.blocks + [0] * (widest - len(s.blocks)) for s, _ in work]
        return cls(
            torch.tensor(ids, dtype=torch.int64),
            torch.tensor(positions, dtype=torch.int64),
            torch.tensor(slots, dtype=torch.int64),
            torch.tensor(bounds, dtype=torch.int32),
            torch.tensor(contexts, dtype=torch.int32),
            torch.tensor(table, dtype=torch.int32),
        )


class PagedAttend:
    """Stores the step's keys and values, then attends over each sequence's whole context."""

    def __init__(self, cache: KVCache, inputs: Inputs) -> None:
        self._cache, self._inputs = cache, inputs

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: tuple[int, int] | None
    ) -> torch.Tensor:
        self._cache.write(layer, self._inputs.slots_T, k, v)
        out: torch.Tensor = ops.paged_attention(
            q,
            self._cache.keys[layer],
            self._cache.values[layer],
            self._inputs.block_table,
            self._inputs.cu_seqlens,
            self._inputs.context_lens_B,
            window=window,
        )
        return out


def hidden_states(model: Decoder, cache: KVCache, inputs: Inputs) -> torch.Tensor:
    """[T, D] after the final norm."""
    hidden_TD: torch.Tensor = model(inputs.ids_T, inputs.positions_T, PagedAttend(cache, inputs))
    return hidden_TD


def logits(model: Decoder, hidden_BD: torch.Tensor) -> torch.Tensor:
    """[B, V] float32."""
    return torch.nn.functional.linear(hidden_BD, model.lm_head_weight).float()
