"""``fastsft serve``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from fastsft.verbs.console import UsageError, print_json_line
from fastsft.verbs.speculating import read_speculation

_KEY = "FASTSFT_API_KEY"


def serve(
    model: Path,
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    adapters: tuple[str, ...] = (),
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "cpu",
    quantization: Literal["int8", "w8a8", "int4"] | None = None,
    group_size: Literal[32, 64] = 32,
    speculative_config: str | None = None,
    kv_cache_dtype: Literal["auto", "int8"] = "auto",
    kv_cache_mib: int = 256,
    max_num_seqs: int = 64,
    max_batched_tokens: int = 512,
    prefill_threads: int = 0,
    max_queued_requests: int = 1024,
    max_queued_tokens: int = 1 << 20,
    requests_per_minute: int | None = None,
    max_body_mib: int = 8,
    request_seconds: float = 600.0,
    drain_seconds: float = 30.0,
    json: bool = False,
) -> None:
    """Serve a model over HTTP, as OpenAI's API does.

    The environment variable FASTSFT_API_KEY holds the keys that clients need, separated by commas; a host that other
    machines can reach needs one.

    Args:
        model: folder with config.json, weights and tokenizer.
        host: address to listen on; the default can be reached from this machine alone.
        port: port to listen on; 0 takes a free one.
        name: what clients call the model; the folder's name by default.
        adapters: NAME=FOLDER of adapters (LoRA); clients call them by their names, as they do the model.
        dtype: of weights and cache.
        device: cpu, or cuda for a GPU, whose kernels are of --dtype bfloat16.
        quantization: of the weights, packed when they are loaded.
        group_size: of int4, how many inputs share a scale.
        speculative_config: guess tokens and check several in a step: JSON such as '{"method": "ngram"}'; docs/engine.md
            has the methods (ngram, suffix, draft_model, heads) and their options.
        kv_cache_dtype: auto is the one of the weights.
        kv_cache_mib: memory of the cache.
        max_num_seqs: continuations running at once.
        max_batched_tokens: prompt tokens computed in one step: what is being generated waits for so many.
        prefill_threads: of a process that computes prompts, so that nothing waits for them; 0: none.
        max_queued_requests: so many may wait; others are told to come again.
        max_queued_tokens: the same in tokens.
        requests_per_minute: of each key, or of each address where there are no keys.
        max_body_mib: largest request.
        request_seconds: time in which a request must be answered.
        drain_seconds: time that requests in progress have after SIGTERM.
        json: print the address as a line of JSON.
    """
    import torch

    from fastsft.engine.load import load_core
    from fastsft.engine.options import EngineOptions
    from fastsft.engine.server.run import run
    from fastsft.engine.server.settings import ServerSettings

    keys = tuple(filter(None, (key.strip() for key in os.environ.get(_KEY, "").split(","))))
    settings = ServerSettings(
        name or model.resolve().name, host=host, port=port, api_keys=keys, max_body_bytes=max_body_mib << 20,
        requests_per_minute=requests_per_minute, request_seconds=request_seconds, drain_seconds=drain_seconds,
    )  # fmt: skip
    speculation = read_speculation("serve", speculative_config)
    folders = {}
    for given in adapters:
        adapter, _, path = given.partition("=")
        if not path:
            raise UsageError(f"serve: --adapters: expected NAME=FOLDER, got {given!r}")
        if adapter in folders:
            raise UsageError(f"serve: --adapters: expected different names, got {adapter!r} twice")
        folders[adapter] = path
    options = EngineOptions(
        device=device, dtype=getattr(torch, dtype), quantization=quantization, group_size=group_size,
        kv_cache_dtype=kv_cache_dtype, kv_cache_bytes=kv_cache_mib << 20,
        max_num_seqs=max_num_seqs, max_batched_tokens=max_batched_tokens,
        max_queued_requests=max_queued_requests, max_queued_tokens=max_queued_tokens,
        speculative_config=speculation, adapters=folders,
        prefill_threads=prefill_threads,
    )  # fmt: skip
    core = load_core(model, options=options)

    def announce(url: str) -> None:
        if json:
            print_json_line({"model": settings.model, "url": url})
        else:
            print(f"{settings.model}: {url}", flush=True)

    run(core, settings, announce)
