"""What an engine is made with."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastsft.engine.draft.options import speculative_options
from fastsft.models.decoder import Decoder

QUANTIZATIONS = ("int8", "w8a8", "int4")


@dataclass(frozen=True)
class EngineOptions:
    """The further arguments of :class:`fastsft.LLM`.

    Attributes:
        dtype: of the weights and the cache, of a folder: torch.float32 or torch.bfloat16; a decoder has its own.
        quantization: None, or the weights in "int8", "w8a8" (activations in 8 bits too) or "int4", and the rest in
            bfloat16; see ``ops.pack_weight``.
        group_size: of "int4", how many inputs share a scale: 32 or 64.
        kv_cache_dtype: "auto", as the activations are, or "int8".
        block_size: tokens per cache block, a multiple of 16.
        kv_cache_bytes: memory of the cache; ``num_blocks`` sets it directly.
        max_num_seqs: sequences running at once.
        max_batched_tokens: prompt tokens computed in one step.
        max_queued_requests, max_queued_tokens: while so many requests, or tokens of them, wait, no more are taken;
            None: any number is.
        speculative_config: tokens are guessed and checked several at a time; the results are the same, to the bit.
            ``{"method": "ngram"}``, ``"suffix"``, ``"draft_model"`` or ``"heads"``, and options (docs/engine.md).
        adapters: name -> folder of an adapter (LoRA) as PEFT and ``fastsft train`` write it, or a decoder with one.
        prefill_threads: above 0, prompts are computed by a process of their own with so many threads, so that running
            sequences do not wait for them; the results are the same. It is forked from this one.
        device: where it computes: "cpu", "cuda", "cuda:1"; None: where a decoder is, and the CPU for a folder. On GPUs
            there is no "w8a8", the cache is as the activations are, and there is no prefill process.
        enforce_eager: on a GPU, launch every step kernel by kernel: no CUDA graphs.

    Raises:
        ValueError: an unknown or a too small value; the message names the argument.
    """

    dtype: torch.dtype = torch.float32
    quantization: str | None = None
    group_size: int = 32
    kv_cache_dtype: str = "auto"
    block_size: int = 16
    kv_cache_bytes: int = 256 << 20
    num_blocks: int | None = None
    max_num_seqs: int = 64
    max_batched_tokens: int = 4096
    max_queued_requests: int | None = None
    max_queued_tokens: int | None = None
    speculative_config: Mapping[str, Any] | None = None
    adapters: Mapping[str, str | os.PathLike[str] | Decoder] = field(default_factory=dict)
    prefill_threads: int = 0
    device: torch.device | str | None = None
    enforce_eager: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"LLM: dtype: expected torch.float32 or torch.bfloat16, got {self.dtype}")
        for name, known in (("quantization", (None, *QUANTIZATIONS)), ("kv_cache_dtype", ("auto", "int8"))):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"LLM: {name}: expected one of {', '.join(map(str, known))}, got {value!r}")
        if self.group_size not in (32, 64):
            raise ValueError(f"LLM: group_size: expected 32 or 64, got {self.group_size!r}")
        if self.block_size < 1 or self.block_size % 16:
            raise ValueError(f"LLM: block_size: expected a positive multiple of 16, got {self.block_size}")
        threads = self.prefill_threads
        if threads < 0 or (threads and sys.platform != "linux"):
            raise ValueError(f"LLM: prefill_threads: expected 0, or on Linux a positive number, got {threads}")
        counts = ("num_blocks", "max_num_seqs", "max_batched_tokens", "max_queued_requests", "max_queued_tokens")
        for name in counts:
            if (count := getattr(self, name)) is not None and count < 1:
                raise ValueError(f"LLM: {name}: expected at least 1, got {count}")
        if self.speculative_config is not None:
            speculative_options(self.speculative_config)
