"""From a model to what runs it: packed on the CPU, in torch ops and kernels on a device."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from fastsft.engine.device_runner import DeviceRunner
from fastsft.engine.graphs import CudaCapture
from fastsft.engine.options import EngineOptions
from fastsft.engine.packed_runner import PackedRunner
from fastsft.models.decoder import Decoder
from fastsft.models.device import place_decoder
from fastsft.models.packed import pack_decoder
from fastsft.ops._attention_inputs import CUDA_DTYPES, HAS_CUDA
from fastsft.progress import bars

_log = logging.getLogger("fastsft.engine")

PACKED = ("cpu",)
"""Kinds of devices whose models are packed."""


def check_device(device: torch.device, options: EngineOptions) -> None:
    """Raise a ValueError for a device that is not there, and for what the CPU has and others have not."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"LLM: device: expected cpu or cuda, got {device}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"LLM: device: torch finds no usable GPU, got {device}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"LLM: device: torch finds {torch.cuda.device_count()} GPUs, numbered from 0, got {device}")
    if device.type in PACKED:
        return
    known: dict[str, tuple[Any, ...]] = {
        "quantization": (None, "int8", "int4"), "kv_cache_dtype": ("auto",), "prefill_threads": (0,),
    }  # fmt: skip
    for name, expected in known.items():
        if (value := getattr(options, name)) not in expected:
            listed = ", ".join(map(str, expected))
            raise ValueError(f"LLM: {name}: {value} is of the CPU alone; on {device}, expected {listed}")


def make_runner(
    model: str | os.PathLike[str] | Decoder,
    *,
    device: torch.device,
    format: str,
    group: int = 32,
    kv_format: str = "auto",
    block_size: int = 16,
    kv_cache_bytes: int = 0,
    num_blocks: int | None = None,
    shared: bool = False,
    max_rows: int = 1,
    max_batched_tokens: int = 1,
    enforce_eager: bool = False,
    what: str = "LLM",
) -> PackedRunner | DeviceRunner:
    """A model on a device, with a cache.

    Args:
        device: where it computes; the model may be elsewhere.
        format: of the weights; ``group``: of "int4".
        kv_format: "auto", as the activations are, or "int8", on the CPU.
        kv_cache_bytes: memory of the cache, as many blocks as it holds; ``num_blocks`` sets their number directly.
        shared: whether forked processes write to the cache, on the CPU.
        max_rows: sequences of a step that is replayed as a CUDA graph.
        max_batched_tokens: tokens of prompts in a step, which is run once where there are graphs.
        enforce_eager: no graphs.
        what: who is told in an error.

    Raises:
        ValueError: no room for a block, more of them than memory, or a model that cannot be read or placed.
    """
    if device.type not in PACKED:
        held = place_decoder(model, format, group=group, device=device)
        blocks = _blocks(what, held.device, held.cache_block_bytes(block_size), kv_cache_bytes, num_blocks)
        graphs = device.type == "cuda" and graphs_serve(held.dtype) and not enforce_eager
        if not graphs_serve(held.dtype):
            name = str(held.dtype).removeprefix("torch.")
            reason = "the kernels are for bfloat16" if HAS_CUDA else "this build has no CUDA kernels"
            _log.warning("%s on %s: plain torch attends, slowly, since %s", name, held.device, reason)
        capture = CudaCapture(held.device) if graphs else None
        runner = DeviceRunner(held, block_size=block_size, num_blocks=blocks, max_rows=max_rows, capture=capture)
        with bars() as tell:
            runner.warm_up(max_batched_tokens, tell)
        return runner
    packed = pack_decoder(model, format, group=group)
    kv_format = str(packed.dtype).removeprefix("torch.") if kv_format == "auto" else kv_format
    per_block = packed.config.num_hidden_layers * packed.cache_block_bytes(kv_format, block_size)
    blocks = _blocks(what, device, per_block, kv_cache_bytes, num_blocks)
    return PackedRunner(packed, kv_format=kv_format, block_size=block_size, num_blocks=blocks, shared=shared)


def graphs_serve(dtype: torch.dtype) -> bool:
    """Whether a step has no op that waits for the device: plain torch's paged attention does."""
    return HAS_CUDA and dtype in CUDA_DTYPES


def _blocks(what: str, device: torch.device, per_block: int, kv_cache_bytes: int, num_blocks: int | None) -> int:
    name, given = ("kv_cache_bytes", kv_cache_bytes) if num_blocks is None else ("num_blocks", num_blocks)
    unit = per_block if num_blocks is None else 1
    if given < unit:
        raise ValueError(f"{what}: {name}: expected at least {unit}, one block, got {given}")
    most = _memory_of(device) // per_block
    if given // unit > most:
        raise ValueError(f"{what}: {name}: expected at most {most * unit}, which {device} has memory for, got {given}")
    return given // unit


def _memory_of(device: torch.device) -> int:
    """All of it, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
