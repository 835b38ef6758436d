"""Runs the packed decoder over its paged cache.

Shape suffixes: R rows wanted, D hidden size, V vocabulary.
"""

from __future__ import annotations

import mmap
import os

import torch

from fastsft.engine.runner import Inputs
from fastsft.models.decoder import Decoder
from fastsft.models.packed import PackedDecoder
from fastsft.models.packed_adapter import pack_adapter
from fastsft.ops.decoder import DecoderAdapter


class PackedRunner:
    """A packed model and its cache, on the CPU.

    A row's logits are the same bits whatever shares its step and however its tokens were split into steps. The keys and
    values of all the step's tokens are written, layer by layer, before any of its rows attends: a sequence may read
    blocks that another one fills in the same step.

    Args:
        model: the packed weights.
        kv_format: "float32" or "bfloat16", as the model's activations are, or "int8".
        block_size: tokens of a block, a multiple of 16.
        num_blocks: blocks of the cache.
        shared: whether forked processes write to the same cache.
    """

    def __init__(
        self, model: PackedDecoder, *, kv_format: str, block_size: int, num_blocks: int, shared: bool = False
    ) -> None:
        self.graph_steps, self.warm_up_seconds = 0, 0.0
        self.model, self.kv_format, self.block_size, self.num_blocks = model, kv_format, block_size, num_blocks
        self.vocab_size = model.config.vocab_size
        self.max_position_embeddings = model.config.max_position_embeddings
        self._cache = model.new_cache(num_blocks, kv_format=kv_format, block_size=block_size)
        if shared:
            memory = mmap.mmap(-1, self._cache.nbytes)  # anonymous: no name is left behind
            self._cache = torch.frombuffer(memory, dtype=torch.uint8).view(self._cache.shape)
        # The system finds and clears memory when it is first written: now, and not in the time of the first prompts.
        self._cache.zero_()
        self.bytes_per_block = self._cache[:, :1].nbytes

    def new_hidden(self, rows: int) -> torch.Tensor:
        """[rows, D], for :meth:`forward` to fill."""
        return torch.empty(rows, self.model.config.hidden_size, dtype=self.model.dtype)

    def forward(self, inputs: Inputs, rows_R: torch.Tensor, hidden_RD: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the step's tokens; logits float32 [R, V] after those of them that ``rows_R`` names, and into
        ``hidden_RD`` what the head made them from."""
        self.model.check_whole()
        return self.model.step(
            inputs.ids_T, self._cache, inputs.block_table, inputs.cu_seqlens, inputs.context_lens_B, rows_R,
            kv_format=self.kv_format, block_size=self.block_size, adapters=inputs.adapters, hidden=hidden_RD,
        )  # fmt: skip

    def check_device(self) -> None:
        """The CPU is there."""

    def pack_adapter(self, adapter: str | os.PathLike[str] | Decoder) -> DecoderAdapter:
        """Arguments and errors: :func:`fastsft.models.packed_adapter.pack_adapter`."""
        return pack_adapter(self.model, adapter)

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        for source, target in copies:
            self._cache[:, target] = self._cache[:, source]

    def update(self, model: Decoder | str | os.PathLike[str]) -> None:
        """Compute with other weights of the same architecture. What is in the cache belongs to the old ones.

        Raises:
            ValueError: another architecture or device.
        """
        self.model.update(model)

    def check_has(self, what: str, model: Decoder) -> None:
        """Raise a ValueError, in the name of ``what``, unless :meth:`update` with the model would change nothing."""
        self.model.check_has(what, model)
