"""What the engine computes a step with: the step as tensors, and who runs it.

Shape suffixes: T tokens of the step, B sequences, R rows wanted, D hidden size, V vocabulary.
"""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from fastsft.engine.sequence import Sequence
from fastsft.engine.tree import rows_of
from fastsft.models.decoder import Decoder


@dataclass(frozen=True)
class Inputs:
    """A step as tensors: each sequence's next tokens, how far they reach, and its blocks. Its forks follow it as
    sequences of their own."""

    ids_T: torch.Tensor
    cu_seqlens: torch.Tensor
    context_lens_B: torch.Tensor
    block_table: torch.Tensor
    adapters: list[Any] = field(default_factory=list)
    """Of each sequence what the runner made of it, or None; empty where none has one."""

    @classmethod
    def build(cls, work: list[tuple[Sequence, int]]) -> Inputs:
        """``work``: sequences, and how many tokens of each to compute, those of its forks included."""
        ids: list[int] = []
        bounds, contexts = [0], list[int]()
        held: list[array[int]] = []
        adapters: list[Any] = []
        adapted = any(s.adapter for s, _ in work)
        for sequence, count in work:
            own = count - rows_of([fork.draft for fork in sequence.forks]) if sequence.forks else count
            ids += sequence.upcoming(own)
            bounds.append(len(ids))
            contexts.append(sequence.computed + own)
            held.append(sequence.blocks)
            for fork in sequence.forks:
                ids += [sequence.tokens[-1], *fork.draft]
                bounds.append(len(ids))
                contexts.append(len(sequence.tokens) + len(fork.draft))
                held.append(fork.blocks)
            if adapted:
                adapter = sequence.adapter.weights if sequence.adapter else None
                adapters += [adapter] * (1 + len(sequence.forks))
        width = 4 * max(map(len, held))
        table = bytearray().join(blocks.tobytes().ljust(width, b"\0") for blocks in held)
        return cls(
            torch.tensor(ids, dtype=torch.int64),
            torch.tensor(bounds, dtype=torch.int32),
            torch.tensor(contexts, dtype=torch.int32),
            torch.frombuffer(table, dtype=torch.int32).view(len(held), -1),
            adapters,
        )


def places_of(inputs: Inputs, block_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int64 [T] each: a token's sequence, where it stands there, and the slot of the cache for its key and value."""
    bounds, contexts = inputs.cu_seqlens.long(), inputs.context_lens_B.long()
    owner_T = torch.repeat_interleave(bounds.diff())
    positions_T = torch.arange(len(inputs.ids_T)) + (contexts - bounds[1:])[owner_T]
    blocks_T = inputs.block_table[owner_T, positions_T // block_size].long()
    return owner_T, positions_T, blocks_T * block_size + positions_T % block_size


class Runner(Protocol):
    """A model and its cache of ``num_blocks`` blocks of ``block_size`` tokens.

    The keys and values of all the step's tokens are written, layer by layer, before any of its rows attends: a sequence
    may read blocks that another one fills in the same step.
    """

    block_size: int
    num_blocks: int
    bytes_per_block: int
    vocab_size: int
    max_position_embeddings: int
    warm_up_seconds: float
    """Time before the first request for what would else be made while requests wait."""

    @property
    def graph_steps(self) -> int:
        """Steps that were one launch of a CUDA graph."""

    def new_hidden(self, rows: int) -> torch.Tensor:
        """[rows, D], for :meth:`forward` to fill."""

    def forward(self, inputs: Inputs, rows_R: torch.Tensor, hidden_RD: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the step's tokens; logits float32 [R, V] after those of them that ``rows_R`` names, valid until the
        next call, and into ``hidden_RD`` what the head made them from."""

    def check_device(self) -> None:
        """Raise a RuntimeError where the device can no longer be used, as after an access outside its memory."""

    def pack_adapter(self, adapter: str | os.PathLike[str] | Decoder) -> Any:
        """What ``Inputs.adapters`` takes.

        Raises:
            ValueError: a folder that cannot be read, or an adapter that does not fit the model.
        """

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """(source, target) each, one after the other: in all layers, before what is computed next."""

    def update(self, model: Decoder | str | os.PathLike[str]) -> None:
        """Compute with other weights of the same architecture. What is in the cache belongs to the old ones.

        Raises:
            ValueError: another architecture.
        """

    def check_has(self, what: str, model: Decoder) -> None:
        """Raise a ValueError, in the name of ``what``, unless :meth:`update` with the model would change nothing."""
