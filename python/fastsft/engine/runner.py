"""Runs the decoder over the paged cache.

Shape suffixes: T tokens of the step, B sequences, D hidden size, V vocabulary, G key heads, K head size.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from fastsft import ops
from fastsft.engine.cache import KVCache
from fastsft.engine.sequence import Sequence
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
            ids += sequence.upcoming(count)
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


class Runner:
    """A model and its cache: what a step computes with.

    The keys and values of all the step's tokens are written, layer by layer, before any of its rows attends: a sequence
    may read blocks that another one fills in the same step.

    Raises:
        ValueError: a model that is not on the CPU, or a cache too small for one block.
    """

    def __init__(self, model: Decoder, *, block_size: int, num_blocks: int) -> None:
        weights = model.lm_head_weight
        if weights.device.type != "cpu":
            raise ValueError(f"LLM: model: expected on the CPU (the engine has no other path), got {weights.device}")
        self.model, self.block_size, self.num_blocks = model, block_size, num_blocks
        self.vocab_size = model.config.vocab_size
        self.max_position_embeddings = model.config.max_position_embeddings
        self.bytes_per_block = bytes_per_block(model, block_size)
        self._cache = KVCache(model.config, num_blocks=num_blocks, block_size=block_size, dtype=weights.dtype)

    def forward(self, inputs: Inputs, rows_R: torch.Tensor) -> torch.Tensor:
        """Compute the step's tokens; logits float32 [R, V] after those of them that ``rows_R`` names."""
        hidden_TD = self.model(inputs.ids_T, inputs.positions_T, PagedAttend(self._cache, inputs))
        return torch.nn.functional.linear(hidden_TD[rows_R], self.model.lm_head_weight).float()

    def copy_block(self, source: int, target: int) -> None:
        self._cache.copy_block(source, target)

    def update(self, model: Decoder) -> None:
        """Compute with other weights of the same architecture. What is in the cache belongs to the old ones.

        Raises:
            ValueError: another architecture, dtype or device.
        """
        if (problem := difference(self.model, model)) is not None:
            raise ValueError(f"update_weights: model: {problem}")
        self.model = model


def bytes_per_block(model: Decoder, block_size: int) -> int:
    return KVCache.bytes_per_block(model.config, block_size, model.lm_head_weight.dtype)


def difference(old: Decoder, new: Decoder) -> str | None:
    """Why the weights of one cannot take the place of the other's."""
    for name in ("dtype", "device"):
        ours, theirs = getattr(old.lm_head_weight, name), getattr(new.lm_head_weight, name)
        if ours != theirs:
            return f"expected {name} {ours}, got {theirs}"
    for field in dataclasses.fields(old.config):
        ours, theirs = getattr(old.config, field.name), getattr(new.config, field.name)
        if ours != theirs and field.name not in ("source", "text"):  # of the file, as it was written
            return f"expected {field.name} {ours}, got {theirs}"
    return None
