"""From a model folder, or a loaded model, to an engine."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fastsft.engine.core import EngineCore
from fastsft.engine.runner import Runner, bytes_per_block
from fastsft.models.decoder import Decoder
from fastsft.models.tokenizer import Tokenizer
from fastsft.models.weights import load_model


def load_core(
    model: str | os.PathLike[str] | Decoder,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    block_size: int = 16,
    kv_cache_bytes: int = 256 << 20,
    num_blocks: int | None = None,
    max_num_seqs: int = 64,
    max_batched_tokens: int = 4096,
    max_queued_requests: int | None = None,
    max_queued_tokens: int | None = None,
) -> EngineCore:
    """Arguments and errors: :class:`fastsft.LLM` and :class:`EngineCore`."""
    if isinstance(model, Decoder):
        if tokenizer is None:
            raise ValueError("LLM: tokenizer: needed beside a loaded model")
    else:
        folder, model = model, load_model(Path(model), dtype=dtype)
        tokenizer = tokenizer or Tokenizer.from_folder(folder)
    if num_blocks is None and block_size >= 1:
        num_blocks = kv_cache_bytes // bytes_per_block(model, block_size)
    if num_blocks is None or min(num_blocks, block_size) < 1 or max_num_seqs < 1 or max_batched_tokens < 1:
        raise ValueError(
            "LLM: expected at least 1 each, got "
            f"{num_blocks=}, {block_size=}, {max_num_seqs=}, {max_batched_tokens=} ({kv_cache_bytes=})"
        )
    return EngineCore(
        Runner(model, block_size=block_size, num_blocks=num_blocks), tokenizer, end_ids=end_ids(model, tokenizer),
        max_num_seqs=max_num_seqs, max_batched_tokens=max_batched_tokens,
        max_queued_requests=max_queued_requests, max_queued_tokens=max_queued_tokens,
    )  # fmt: skip


def end_ids(model: Decoder, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokenizer's, which read generation_config.json; without that file, as in transformers, config.json's."""
    found = tokenizer.eos_ids
    given = model.config.source.get("eos_token_id")
    if given is None or "generation_config.json" in tokenizer.files:
        return found
    return tuple(dict.fromkeys([*found, *(given if isinstance(given, list) else [given])]))
