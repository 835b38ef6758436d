"""Attention: packed, and over a paged cache."""

from __future__ import annotations

import itertools
import math

import torch


def visible(len_q: int, len_k: int, causal: bool, window: tuple[int, int] | None, device: torch.device) -> torch.Tensor:
    """Which keys each query of one sequence sees: bool [len_q, len_k].

    Query i stands at key position ``i + len_k - len_q`` (bottom-right alignment). ``window = (left, right)`` keeps keys
    from ``left`` before to ``right`` after that position; -1 means unbounded.
    """
    position = torch.arange(len_q, device=device)[:, None] + (len_k - len_q)
    key = torch.arange(len_k, device=device)[None, :]
    mask = torch.ones(len_q, len_k, dtype=torch.bool, device=device)
    if causal:
        mask &= key <= position
    if window is not None:
        left, right = window
        if left >= 0:
            mask &= key >= position - left
        if right >= 0:
            mask &= key <= position + right
    return mask


def attention_plan(
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None = None,
    *,
    causal: bool = True,
    window: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The packed keys each query sees and the packed queries that see each key: ``[Tq, 2]`` and ``[Tk, 2]``.

    A row is ``(first, last + 1)``, or ``(0, 0)`` where there are none.
    """
    cu_q = cu_seqlens_q.tolist()
    cu_k = cu_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    mask = torch.zeros(cu_q[-1], cu_k[-1], dtype=torch.bool)
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(cu_q), itertools.pairwise(cu_k), strict=True):
        mask[q0:q1, k0:k1] = visible(q1 - q0, k1 - k0, causal, window, mask.device)
    return _first_and_end(mask), _first_and_end(mask.T)


def _first_and_end(mask: torch.Tensor) -> torch.Tensor:
    rows = [row.nonzero().flatten().tolist() for row in mask]
    return torch.tensor([(row[0], row[-1] + 1) if row else (0, 0) for row in rows], dtype=torch.int32).reshape(-1, 2)


def attention_one(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    scale: float | None,
    window: tuple[int, int] | None,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence: q [Tq, Hq, D], k and v [Tk, Hkv, D] -> out [Tq, Hq, D], lse [Hq, Tq]; no key, no output (0)."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    mask = visible(q.shape[0], k.shape[0], causal, window, q.device)
    scores = scores.masked_fill(~mask, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    probability = torch.where(mask, torch.exp(scores - lse.nan_to_num(neginf=0.0)[..., None]), 0.0)
    return torch.einsum("hqk,khd->qhd", probability, v), lse


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention within each packed sequence, one at a time -> (out like q, lse [Hq, Tq])."""
    bounds_q = cu_seqlens_q.tolist()
    bounds_k = bounds_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    outs, lses = [torch.zeros_like(q[:0])], [q.new_zeros(q.shape[1], 0)]
    for q0, q1, k0, k1 in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False):
        out, lse = attention_one(
            q[q0:q1], k[k0:k1], v[k0:k1], causal=causal, scale=scale, window=window, softcap=softcap
        )
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, dim=1)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Gather each sequence's keys and values from its blocks, then attend as in :func:`varlen_attention`."""
    block_size = k_cache.shape[1]
    bounds = cu_seqlens_q.tolist()
    outs = [torch.zeros_like(q[:0])]
    for b, (q0, q1) in enumerate(itertools.pairwise(bounds)):
        length = int(context_lens[b])
        blocks = block_table[b, : -(-length // block_size)].long()
        k = k_cache[blocks].flatten(0, 1)[:length]
        v = v_cache[blocks].flatten(0, 1)[:length]
        outs.append(attention_one(q[q0:q1], k, v, causal=causal, scale=scale, window=window, softcap=softcap)[0])
    return torch.cat(outs)
