"""Attention over a paged key/value cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsft import _C
from fastsft.ops import reference
from fastsft.ops._attention_inputs import (
    CUDA_DTYPES,
    HAS_CUDA,
    NO_CUDA,
    SCHEMA_OPTIONS,
    check_heads,
    check_int32,
    check_offsets,
    checked_options,
    reference_options,
)
from fastsft.ops._library import define
from fastsft.ops._registry import Implementation


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Attention of each sequence's last queries over its keys and values in a block cache; no gradients.

    Decode (one query per sequence), chunked prefill and the verification of drafted tokens are the same call and may be
    mixed. A row's result has the same bits however many queries or sequences are in the call.

    Args:
        q: ``[Tq, Hq, D]``, packed; dtypes and head sizes as for :func:`varlen_attention`.
        k_cache, v_cache: ``[num_blocks, block_size, Hkv, D]`` of q's dtype, last dimension contiguous.
        block_table: int32 ``[B, max_blocks]``: key j of sequence b is slot ``j % block_size`` of block
            ``block_table[b, j // block_size]``. Entries past the context are not read.
        cu_seqlens_q: int32 ``[B + 1]``, from 0 ascending to Tq.
        context_lens: int32 ``[B]``: keys per sequence, those of the current queries included (they must be in the cache
            already).
        causal, scale, window, softcap: as for :func:`varlen_attention`.

    Returns:
        ``[Tq, Hq, D]`` of q's dtype, contiguous.

    Raises:
        ValueError: for a shape, dtype, offset, block id or option outside the above, or a context shorter than its
            queries. On CUDA in bfloat16 and float16 the values of offsets, block ids and contexts are not looked at:
            rows that depend on a bad block id or context are NaN.
    """
    op = "paged_attention"
    check_heads(op, q, k_cache, v_cache, "k_cache", 4)
    check_int32(op, block_table=block_table, cu_seqlens_q=cu_seqlens_q, context_lens=context_lens)
    options = checked_options(op, q, causal, scale, window, softcap)
    out: Tensor = _paged(q, k_cache, v_cache, block_table, cu_seqlens_q, context_lens, *options)
    return out


def _fake_paged(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


def _native_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    cu_q: Tensor,
    lens: Tensor,
    causal: bool,
    scale: float,
    left: int,
    right: int,
    softcap: float,
) -> Tensor:
    out = q.new_empty(q.shape)
    scratch = None
    if q.is_cuda:
        rows, max_keys = q.shape[0] * q.shape[1], table.shape[1] * k_cache.shape[1]
        scratch = q.new_empty(_C.paged_attention_scratch(rows, q.shape[2], max_keys), dtype=torch.float32)
    _C.paged_attention(q, k_cache, v_cache, table, cu_q, lens, causal, scale, left, right, softcap, scratch, out)
    return out


def _torch_paged(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, cu_q: Tensor, lens: Tensor, *options: Any
) -> Tensor:
    check_offsets("paged_attention", "cu_seqlens_q", cu_q, q.shape[0])
    caches = (k_cache.float(), v_cache.float())
    return reference.paged_attention(q.float(), *caches, table, cu_q, lens, **reference_options(*options)).to(q.dtype)


def _cuda_paged(q: Tensor, *arguments: Any) -> Tensor:
    native = HAS_CUDA and q.dtype in CUDA_DTYPES
    return (_native_paged if native else _torch_paged)(q, *arguments)


_PAGED_ON_CUDA = Implementation("native", "CUDA kernels, not yet run on a GPU; float32: plain torch")
_paged = define(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor cu_seqlens_q, "
    f"Tensor context_lens, {SCHEMA_OPTIONS}) -> Tensor",
    fake=_fake_paged,
    cpu=_native_paged,
    cuda=_cuda_paged,
    cuda_is=_PAGED_ON_CUDA if HAS_CUDA else NO_CUDA,
)
