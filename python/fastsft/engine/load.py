"""From a model folder, or a loaded model, to an engine."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import torch

from fastsft.engine.core import EngineCore
from fastsft.engine.draft.speculation import speculation_from
from fastsft.engine.prefill import PrefillWorker
from fastsft.engine.runner import Runner
from fastsft.models.config import ModelConfig
from fastsft.models.decoder import Decoder
from fastsft.models.packed import pack_decoder
from fastsft.models.tokenizer import Tokenizer

QUANTIZATIONS = ("int8", "w8a8", "int4")


def load_core(
    model: str | os.PathLike[str] | Decoder,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    quantization: str | None = None,
    kv_cache_dtype: str = "auto",
    block_size: int = 16,
    kv_cache_bytes: int = 256 << 20,
    num_blocks: int | None = None,
    max_num_seqs: int = 64,
    max_batched_tokens: int = 4096,
    max_queued_requests: int | None = None,
    max_queued_tokens: int | None = None,
    speculative_config: Mapping[str, Any] | None = None,
    prefill_threads: int = 0,
) -> EngineCore:
    """Arguments and errors: :class:`fastsft.LLM` and :class:`EngineCore`."""
    if isinstance(model, Decoder):
        if tokenizer is None:
            raise ValueError("LLM: tokenizer: needed beside a loaded model")
        dtype = model.lm_head_weight.dtype
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"LLM: dtype: expected torch.float32 or torch.bfloat16, got {dtype}")
    for name, value, known in (
        ("quantization", quantization, (None, *QUANTIZATIONS)),
        ("kv_cache_dtype", kv_cache_dtype, ("auto", "int8")),
    ):
        if value not in known:
            raise ValueError(f"LLM: {name}: expected one of {', '.join(map(str, known))}, got {value!r}")
    if block_size < 1 or block_size % 16:
        raise ValueError(f"LLM: block_size: expected a positive multiple of 16, got {block_size}")
    if prefill_threads < 0 or (prefill_threads and sys.platform != "linux"):
        raise ValueError(f"LLM: prefill_threads: expected 0, or on Linux a positive number, got {prefill_threads}")
    packed = pack_decoder(model, quantization or str(dtype).removeprefix("torch."))
    tokenizer = tokenizer or Tokenizer.from_folder(model)  # type: ignore[arg-type]  # a model came with its tokenizer
    kv_format = "int8" if kv_cache_dtype == "int8" else str(packed.dtype).removeprefix("torch.")
    if num_blocks is None:
        layers = packed.config.num_hidden_layers
        num_blocks = kv_cache_bytes // (layers * packed.cache_block_bytes(kv_format, block_size))
    if min(num_blocks, max_num_seqs, max_batched_tokens) < 1:
        raise ValueError(
            f"LLM: expected at least 1 each, got {num_blocks=}, {max_num_seqs=}, {max_batched_tokens=} "
            f"({kv_cache_bytes=})"
        )
    runner = Runner(
        packed, kv_format=kv_format, block_size=block_size, num_blocks=num_blocks, shared=prefill_threads > 0
    )
    drafter = speculation_from(speculative_config, tokenizer, packed) if speculative_config else None
    return EngineCore(
        runner, tokenizer, end_ids=end_ids(packed.config, tokenizer),
        max_num_seqs=max_num_seqs, max_batched_tokens=max_batched_tokens,
        max_queued_requests=max_queued_requests, max_queued_tokens=max_queued_tokens,
        drafter=drafter, keep_hidden=drafter is not None and drafter.needs_hidden,
        prefill=PrefillWorker(runner, prefill_threads) if prefill_threads else None,
    )  # fmt: skip


def end_ids(config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokenizer's, which read generation_config.json; without that file, as in transformers, config.json's."""
    found = tokenizer.eos_ids
    given = config.source.get("eos_token_id")
    if given is None or "generation_config.json" in tokenizer.files:
        return found
    return tuple(dict.fromkeys([*found, *(given if isinstance(given, list) else [given])]))
