"""Runs a decoder on a device over its paged cache.

Shape suffixes: T tokens of the step, B sequences, R rows wanted, D hidden size, V vocabulary.
"""

from __future__ import annotations

import os

import torch

from fastsft.engine.graphs import Capture, DecodeSteps
from fastsft.engine.runner import Inputs, places_of
from fastsft.models.decoder import Decoder
from fastsft.models.device import DeviceAdapter, DeviceDecoder, Rows, Span, place_adapter

_FEW_TOKENS = 16  # of one sequence in a padded step: each reads all keys and values before it for itself


class DeviceRunner:
    """A model and its cache on a device. Steps come from the host and logits stay on the device.

    Steps of few tokens, as of decoding with drafts and without, are padded and, on a GPU, replayed as CUDA graphs
    (engine/graphs.py); those with prompts or adapters are launched kernel by kernel.

    Args:
        model: the weights.
        block_size: tokens of a block.
        num_blocks: blocks of the cache.
        max_rows: tokens of a step that is padded.
        capture: None: no graphs.
    """

    def __init__(
        self, model: DeviceDecoder, *, block_size: int, num_blocks: int, max_rows: int, capture: Capture | None
    ) -> None:
        self.model, self.block_size, self.num_blocks = model, block_size, num_blocks
        self.vocab_size = model.config.vocab_size
        self.max_position_embeddings = model.config.max_position_embeddings
        self._cache = model.new_cache(num_blocks + 1, block_size)
        self.bytes_per_block = self._cache[:, :, :1].nbytes
        self._decode = DecodeSteps(model, self._cache, block_size=block_size, max_rows=max_rows, capture=capture)

    @property
    def graph_steps(self) -> int:
        """Steps that were one launch of a CUDA graph."""
        return self._decode.replayed

    def new_hidden(self, rows: int) -> torch.Tensor:
        """[rows, D], for :meth:`forward` to fill."""
        return torch.empty(rows, self.model.config.hidden_size, dtype=self.model.dtype, device=self.model.device)

    @torch.inference_mode()
    def forward(self, inputs: Inputs, rows_R: torch.Tensor, hidden_RD: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the step's tokens; logits float32 [R, V] after those of them that ``rows_R`` names, valid until the
        next call, and into ``hidden_RD`` what the head made them from."""
        self.model.check_whole()
        count = len(inputs.ids_T)
        rows_R, whole = rows_R.to(self.model.device), torch.equal(rows_R, torch.arange(count))
        few = count <= self._decode.max_rows and int(inputs.cu_seqlens.diff().max()) <= _FEW_TOKENS
        if few and not inputs.adapters:
            hidden_TD, logits_TV = self._decode(inputs)
            wanted_RD, logits_RV = (hidden_TD, logits_TV) if whole else (hidden_TD[rows_R], logits_TV[rows_R])
        else:
            wanted_RD = self.model.hidden(self._rows(inputs), self._cache, spans_of(inputs))[rows_R]
            logits_RV = self.model.logits(wanted_RD)
        if hidden_RD is not None:
            hidden_RD.copy_(wanted_RD)
        return logits_RV

    def _rows(self, inputs: Inputs) -> Rows:
        _, positions_T, slots_T = places_of(inputs, self.block_size)
        host = (inputs.ids_T, positions_T, slots_T, inputs.block_table, inputs.cu_seqlens, inputs.context_lens_B)
        return Rows(*(x.to(self.model.device) for x in host))

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

    def check_has(self, what: str, model: Decoder) -> None:
        """Raise a ValueError, in the name of ``what``, unless :meth:`update` with the model would change nothing."""
        self.model.check_has(what, model)


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
