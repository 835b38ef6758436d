"""Runs a decoder on a device over its paged cache.

Shape suffixes: T tokens of the step, B sequences, R rows wanted, D hidden size, V vocabulary.
"""

from __future__ import annotations

import os

import torch

from fastsft.engine.runner import Inputs
from fastsft.models.decoder import Decoder
from fastsft.models.device import DeviceAdapter, DeviceDecoder, Rows, Span, place_adapter


class DeviceRunner:
    """A model and its cache on a device. Steps come from the host and logits stay on the device.

    Args:
        model: the weights.
        block_size: tokens of a block.
        num_blocks: blocks of the cache.
    """

    def __init__(self, model: DeviceDecoder, *, block_size: int, num_blocks: int) -> None:
        self.model, self.block_size, self.num_blocks = model, block_size, num_blocks
        self.vocab_size = model.config.vocab_size
        self.max_position_embeddings = model.config.max_position_embeddings
        self._cache = model.new_cache(num_blocks, block_size)
        self.bytes_per_block = self._cache[:, :, :1].nbytes

    def new_hidden(self, rows: int) -> torch.Tensor:
        """[rows, D], for :meth:`forward` to fill."""
        return torch.empty(rows, self.model.config.hidden_size, dtype=self.model.dtype, device=self.model.device)

    @torch.inference_mode()
    def forward(self, inputs: Inputs, rows_R: torch.Tensor, hidden_RD: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the step's tokens; logits float32 [R, V] after those of them that ``rows_R`` names, valid until the
        next call, and into ``hidden_RD`` what the head made them from."""
        rows = rows_of(inputs, self.block_size, self.model.device)
        out_TD = self.model.hidden(rows, self._cache, spans_of(inputs))
        wanted_RD = out_TD[rows_R.to(self.model.device)]
        if hidden_RD is not None:
            hidden_RD.copy_(wanted_RD)
        return self.model.logits(wanted_RD)

    def pack_adapter(self, adapter: str | os.PathLike[str] | Decoder) -> DeviceAdapter:
        """Arguments and errors: :func:`fastsft.models.device.place_adapter`."""
        return place_adapter(self.model, adapter)

    def copy_block(self, source: int, target: int) -> None:
        self._cache[:, :, target] = self._cache[:, :, source]

    def update(self, model: Decoder | str | os.PathLike[str]) -> None:
        """Compute with other weights of the same architecture. What is in the cache belongs to the old ones.

        Raises:
            ValueError: another architecture.
        """
        self.model.update(model)


def rows_of(inputs: Inputs, block_size: int, device: torch.device) -> Rows:
    """The step on the device: where each token stands, and where its key and value go."""
    bounds, contexts = inputs.cu_seqlens.long(), inputs.context_lens_B.long()
    owner_T = torch.repeat_interleave(bounds.diff())
    positions_T = torch.arange(len(inputs.ids_T)) + (contexts - bounds[1:])[owner_T]
    slots_T = inputs.block_table[owner_T, positions_T // block_size].long() * block_size + positions_T % block_size
    return Rows(
        inputs.ids_T.to(device),
        positions_T.to(device),
        slots_T.to(device),
        inputs.block_table.to(device),
        inputs.cu_seqlens.to(device),
        inputs.context_lens_B.to(device),
    )


def spans_of(inputs: Inputs) -> list[Span]:
    """Neighbours with the same adapter go through it together."""
    spans: list[Span] = []
    bounds = inputs.cu_seqlens.tolist()
    for adapter, begin, end in zip(inputs.adapters, bounds, bounds[1:], strict=False):
        if adapter is None:
            continue
        if spans and spans[-1][1] == begin and spans[-1][2] is adapter:
            begin = spans.pop()[0]
        spans.append((begin, end, adapter))
    return spans
