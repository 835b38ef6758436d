"""Keys and values in blocks, as csrc/include/fastsft/kv_cache.h lays them out, and attention over them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from fastsft.ops.reference.attention import paged_attention

_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def kv_places(format: str, head_dim: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Where element i of slot s stands, counted in elements from the start of its head: K and V, [block_size, D]."""
    slot, i = torch.arange(block_size)[:, None], torch.arange(head_dim)
    group, key = slot // 16 * 16 * head_dim, slot % 16
    if format == "float32":
        k, v = group + i * 16 + key, slot * head_dim + i
    else:
        k, v = group + (i // 2 * 16 + key) * 2 + i % 2, (slot // 2 * head_dim + i) * 2 + slot % 2
    return k, v + block_size * head_dim


def kv_read(blocks: Tensor, layout: Any) -> tuple[Tensor, Tensor]:
    """uint8 [num_blocks, block_bytes] -> what K and V stand for, float32 [num_blocks, block_size, heads, D]."""
    elements, scales = _split(blocks, layout)
    k, v = (elements[..., at].float() for at in kv_places(layout.format, layout.head_dim, layout.block_size))
    if layout.format == "int8":
        k, v = k * scales[:, :, 0, :, None], v * scales[:, :, 1, :, None]
    return k.transpose(1, 2), v.transpose(1, 2)


def kv_write(
    blocks: Tensor, layout: Any, k: Tensor, v: Tensor, block_table: Tensor, cu_seqlens: Tensor, context_lens: Tensor
) -> None:
    """Token by token; zeros behind a sequence's last token up to a multiple of 16."""
    elements, scales = _split(blocks, layout)
    places = kv_places(layout.format, layout.head_dim, layout.block_size)
    for b, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        context = int(context_lens[b])
        if begin == end:
            continue
        for position in range(context - (end - begin), -(-context // 16) * 16):
            row = position - context + end
            block, slot = int(block_table[b, position // layout.block_size]), position % layout.block_size
            for i, (x, place) in enumerate(zip((k, v), places, strict=True)):
                values = x[row] if row < end else torch.zeros_like(x[0])
                if layout.format == "int8":
                    values, scales[block, :, i, slot] = quantise(values)
                elements[block, :, place[slot]] = values


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., D] -> int8 [..., D] and a scale [...], the largest magnitude / 127; NaN where x is not finite."""
    scale = x.float().abs().amax(-1) / 127
    scale = torch.where(scale.isfinite(), torch.where(scale < 2.0**-126, 0, scale), torch.nan)
    usable = scale > 0
    values = torch.where(usable[..., None], x.float() / torch.where(usable, scale, 1)[..., None], 0)
    return values.round().to(torch.int8), scale


def cached_attention(
    q: Tensor,
    blocks: Tensor,
    layout: Any,
    block_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    *,
    window_left: int = -1,
    scale: float | None = None,
) -> Tensor:
    """:func:`paged_attention` over what the blocks stand for, in q's type."""
    k, v = (x.to(q.dtype) for x in kv_read(blocks, layout))
    window = (window_left, -1)
    return paged_attention(q, k, v, block_table, cu_seqlens, context_lens, scale=scale, window=window)


def _split(blocks: Tensor, layout: Any) -> tuple[Tensor, Tensor]:
    """Views: elements [num_blocks, heads, 2 block_size D], scales [num_blocks, heads, 2, block_size or 0]."""
    dtype = _TYPES[layout.format]
    heads = blocks.view(len(blocks), layout.heads, -1)
    size = 2 * layout.block_size * layout.head_dim * dtype.itemsize
    return heads[..., :size].view(dtype), heads[..., size:].view(torch.float32).view(*heads.shape[:2], 2, -1)
