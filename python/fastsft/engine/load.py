"""From a model folder, or a loaded model, to an engine."""

from __future__ import annotations

import dataclasses
import os

from fastsft.engine.core import EngineCore
from fastsft.engine.draft.speculation import speculation_from
from fastsft.engine.options import EngineOptions
from fastsft.engine.prefill import PrefillWorker
from fastsft.engine.runner import Runner
from fastsft.models.config import ModelConfig
from fastsft.models.decoder import Decoder
from fastsft.models.packed import pack_decoder
from fastsft.models.tokenizer import Tokenizer


def load_core(
    model: str | os.PathLike[str] | Decoder,
    tokenizer: Tokenizer | None = None,
    options: EngineOptions | None = None,
) -> EngineCore:
    """Arguments and errors: :class:`fastsft.LLM` and :class:`EngineOptions`."""
    options = options or EngineOptions()
    if isinstance(model, Decoder):
        if tokenizer is None:
            raise ValueError("LLM: tokenizer: needed beside a loaded model")
        options = dataclasses.replace(options, dtype=model.lm_head_weight.dtype)
    packed = pack_decoder(model, options.quantization or str(options.dtype).removeprefix("torch."))
    tokenizer = tokenizer or Tokenizer.from_folder(model)  # type: ignore[arg-type]  # a model came with its tokenizer
    kv_format = "int8" if options.kv_cache_dtype == "int8" else str(packed.dtype).removeprefix("torch.")
    block_bytes = packed.config.num_hidden_layers * packed.cache_block_bytes(kv_format, options.block_size)
    runner = Runner(
        packed, kv_format=kv_format, block_size=options.block_size, num_blocks=_num_blocks(options, block_bytes),
        shared=options.prefill_threads > 0,
    )  # fmt: skip
    drafter = None
    if options.speculative_config:
        drafter = speculation_from(options.speculative_config, tokenizer, packed)
    core = EngineCore(
        runner, tokenizer, end_ids=end_ids(packed.config, tokenizer),
        max_num_seqs=options.max_num_seqs, max_batched_tokens=options.max_batched_tokens,
        max_queued_requests=options.max_queued_requests, max_queued_tokens=options.max_queued_tokens,
        drafter=drafter, keep_hidden=drafter is not None and drafter.needs_hidden,
        prefill=PrefillWorker(runner, options.prefill_threads) if options.prefill_threads else None,
    )  # fmt: skip
    for name, adapter in options.adapters.items():
        core.add_adapter(name, adapter)
    return core


def _num_blocks(options: EngineOptions, block_bytes: int) -> int:
    if options.num_blocks is not None:
        return options.num_blocks
    if options.kv_cache_bytes < block_bytes:
        raise ValueError(
            f"LLM: kv_cache_bytes: expected at least {block_bytes}, one block, got {options.kv_cache_bytes}"
        )
    return options.kv_cache_bytes // block_bytes


def end_ids(config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokenizer's, which read generation_config.json; without that file, as in transformers, config.json's."""
    found = tokenizer.eos_ids
    given = config.source.get("eos_token_id")
    if given is None or "generation_config.json" in tokenizer.files:
        return found
    return tuple(dict.fromkeys([*found, *(given if isinstance(given, list) else [given])]))
