"""From a model folder, or a loaded model, to an engine."""

from __future__ import annotations

import dataclasses
import os

import torch

from fastsft.engine.core import EngineCore
from fastsft.engine.draft.speculation import speculation_from
from fastsft.engine.host import on_host
from fastsft.engine.options import EngineOptions
from fastsft.engine.packed_runner import PackedRunner
from fastsft.engine.place import check_device, make_runner
from fastsft.engine.prefill import PrefillWorker
from fastsft.models.config import ModelConfig
from fastsft.models.decoder import Decoder
from fastsft.models.tokenizer import Tokenizer


@on_host
def load_core(
    model: str | os.PathLike[str] | Decoder,
    tokenizer: Tokenizer | None = None,
    options: EngineOptions | None = None,
) -> EngineCore:
    """Arguments and errors: :class:`fastsft.LLM` and :class:`EngineOptions`."""
    options = options or EngineOptions()
    device = torch.device(options.device or "cpu")
    if isinstance(model, Decoder):
        if tokenizer is None:
            raise ValueError("LLM: tokenizer: needed beside a loaded model")
        options = dataclasses.replace(options, dtype=model.lm_head_weight.dtype)
        device = torch.device(options.device or model.lm_head_weight.device)
    check_device(device, options)
    runner = make_runner(
        model, device=device, format=options.quantization or str(options.dtype).removeprefix("torch."),
        group=options.group_size, kv_format=options.kv_cache_dtype, block_size=options.block_size,
        kv_cache_bytes=options.kv_cache_bytes, num_blocks=options.num_blocks, shared=options.prefill_threads > 0,
        max_rows=options.max_num_seqs, max_batched_tokens=options.max_batched_tokens,
        enforce_eager=options.enforce_eager,
    )  # fmt: skip
    tokenizer = tokenizer or Tokenizer.from_folder(model)  # type: ignore[arg-type]  # a model came with its tokenizer
    drafter = prefill = None
    if options.speculative_config is not None:
        drafter = speculation_from(options.speculative_config, tokenizer, runner.model)
    if isinstance(runner, PackedRunner) and options.prefill_threads:
        prefill = PrefillWorker(runner, options.prefill_threads)
    core = EngineCore(
        runner, tokenizer, end_ids=end_ids(runner.model.config, tokenizer),
        max_num_seqs=options.max_num_seqs, max_batched_tokens=options.max_batched_tokens,
        max_queued_requests=options.max_queued_requests, max_queued_tokens=options.max_queued_tokens,
        drafter=drafter, keep_hidden=drafter is not None and drafter.needs_hidden, prefill=prefill,
    )  # fmt: skip
    for name, adapter in options.adapters.items():
        core.add_adapter(name, adapter)
    return core


def end_ids(config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokenizer's, which read generation_config.json; without that file, as in transformers, config.json's."""
    found = tokenizer.eos_ids
    given = config.source.get("eos_token_id")
    if given is None or "generation_config.json" in tokenizer.files:
        return found
    return tuple(dict.fromkeys([*found, *(given if isinstance(given, list) else [given])]))
