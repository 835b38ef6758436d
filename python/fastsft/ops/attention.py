"""Temporary: the reference, until the native kernels land."""

from __future__ import annotations

from typing import Any

from fastsft.ops import reference


def varlen_attention(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: Any = None,
    softcap: float = 0.0,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Any:
    out, lse = reference.varlen_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, causal=causal, scale=scale, window=window, softcap=softcap
    )
    return (out, lse) if return_lse else out


def paged_attention(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    block_table: Any,
    cu_seqlens_q: Any,
    context_lens: Any,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: Any = None,
    softcap: float = 0.0,
) -> Any:
    return reference.paged_attention(
        q,
        k_cache,
        v_cache,
        block_table,
        cu_seqlens_q,
        context_lens,
        causal=causal,
        scale=scale,
        window=window,
        softcap=softcap,
    )
