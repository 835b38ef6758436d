"""Runs a decoder on a device over its paged cache.

Shape suffixes: T tokens of the step, B sequences, R rows wanted, D hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable

import torch

from fastsft import ops
from fastsft.engine.graphs import Capture, DecodeSteps
from fastsft.engine.runner import Inputs, places_of
from fastsft.models.decoder import Decoder
from fastsft.models.device import DeviceAdapter, DeviceDecoder, Rows, Span, place_adapter

_log = logging.getLogger("fastsft.engine")
_KERNELS = (17, 33)  # rows from which on quantised weights are multiplied by the next kernel
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
        self.warm_up_seconds = 0.0
        self.decode = DecodeSteps(model, self._cache, block_size=block_size, max_rows=max_rows, capture=capture)

    @property
    def graph_steps(self) -> int:
        """Steps that were one launch of a CUDA graph."""
        return self.decode.replayed

    @torch.inference_mode()
    def warm_up(self, max_batched_tokens: int, tell: Callable[[str, int, int], None]) -> None:
        """Before the first request, where graphs are wanted: capture those of all sizes, compute prompts, up to as many
        tokens as a step may have, and draw. So kernels are compiled and loaded, and memory is taken or missed, now.

        Args:
            tell: is told (stage, done, all).
        """
        begin = time.perf_counter()
        self.decode.capture_all(lambda done, total: tell("CUDA graphs", done, total))
        if not self.decode.captured:
            return
        for tokens in sorted({min(n, max_batched_tokens) for n in (*_KERNELS, max_batched_tokens)}):
            logits_RV = self._prompts(tokens)
        rows = len(logits_RV)
        ops.sample(
            logits_RV,
            temperature=torch.ones(rows, dtype=torch.float32),
            top_k=torch.zeros(rows, dtype=torch.int32),
            top_p=torch.full((rows,), 0.9, dtype=torch.float32),
            min_p=torch.zeros(rows, dtype=torch.float32),
            seeds=torch.zeros(rows, dtype=torch.int64),
            positions=torch.zeros(rows, dtype=torch.int64),
        )
        self._cache.zero_()
        self.check_device()
        self.warm_up_seconds = time.perf_counter() - begin
        _log.info("warmed up in %.1f s: %d CUDA graphs", self.warm_up_seconds, self.decode.captured)

    def _prompts(self, tokens: int) -> torch.Tensor:
        """Logits [R, V] after prompts of so many tokens together, which the cache is overwritten with."""
        length = min(self.num_blocks * self.block_size, self.max_position_embeddings, tokens)
        ends = torch.arange(length, tokens + length, length).clamp(max=tokens)
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).int()
        table = torch.arange(-(-length // self.block_size), dtype=torch.int32).repeat(len(ends), 1)
        inputs = Inputs(torch.zeros(tokens, dtype=torch.int64), bounds, bounds.diff(), table)
        return self.forward(inputs, (ends - 1)[: self.decode.max_rows])

    def check_device(self) -> None:
        """Raise a RuntimeError where the device can no longer be used, as after an access outside its memory."""
        if self._cache.is_cuda:
            torch.cuda.synchronize(self._cache.device)

    def new_hidden(self, rows: int) -> torch.Tensor:
        """[rows, D], for :meth:`forward` to fill."""
        return torch.empty(rows, self.model.config.hidden_size, dtype=self.model.dtype, device=self.model.device)

    @torch.inference_mode()
    def forward(self, inputs: Inputs, rows_R: torch.Tensor, hidden_RD: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the step's tokens; logits float32 [R, V] after those of them that ``rows_R`` names, valid until the
        next call, and into ``hidden_RD`` what the head made them from."""
        self.model.check_whole()
        count = len(inputs.ids_T)
        whole = torch.equal(rows_R, torch.arange(count))
        few = count <= self.decode.max_rows and int(inputs.cu_seqlens.diff().max()) <= _FEW_TOKENS
        if few and not inputs.adapters:
            wanted_RD, logits_RV = self.decode(inputs)
            if not whole:
                rows_R = rows_R.to(self.model.device)
                wanted_RD, logits_RV = wanted_RD[rows_R], logits_RV[rows_R]
        else:
            rows_R = rows_R.to(self.model.device)
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

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        if copies:
            ends = torch.tensor(at_once(copies)).to(self.model.device)
            self._cache[:, :, ends[:, 1]] = self._cache[:, :, ends[:, 0]]

    def update(self, model: Decoder | str | os.PathLike[str]) -> None:
        """Compute with other weights of the same architecture. What is in the cache belongs to the old ones.

        Raises:
            ValueError: another architecture.
        """
        self.model.update(model)

    def check_has(self, what: str, model: Decoder) -> None:
        """Raise a ValueError, in the name of ``what``, unless :meth:`update` with the model would change nothing."""
        self.model.check_has(what, model)


def at_once(copies: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Copies that are made one after the other, as those of one: a block that was copied to may be copied from, and one
    that was copied from copied to."""
    origins: dict[int, int] = {}
    for source, target in copies:
        origins[target] = origins.get(source, source)
    return [(source, target) for target, source in origins.items()]


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
