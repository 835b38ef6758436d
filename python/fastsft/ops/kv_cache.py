"""The cache of keys and values that the native decoder reads: its layout, writing to it, attention over it.

The engine's steps do all of this inside one native call; here are its parts, for tests and tools.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsft import _C
from fastsft.ops._library import define
from fastsft.ops._memory import large_empty
from fastsft.ops._registry import Implementation

FORMATS = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class KVLayout:
    """How one layer's keys and values lie in blocks, as ``csrc/include/fastsft/kv_cache.h`` says.

    Args:
        format: "float32"; "bfloat16"; or "int8", with a float32 scale per token and head, for keys and for values.
        heads: key heads.
        head_dim: a multiple of 16 up to 256.
        block_size: tokens, a multiple of 16.

    Raises:
        ValueError: for anything else.
    """

    format: str
    heads: int
    head_dim: int
    block_size: int

    def __post_init__(self) -> None:
        _C.kv_block_bytes(self.format, self.heads, self.head_dim, self.block_size)

    @property
    def block_bytes(self) -> int:
        return _C.kv_block_bytes(self.format, self.heads, self.head_dim, self.block_size)


def empty_blocks(layers: int, num_blocks: int, block_bytes: int) -> Tensor:
    """Uninitialised blocks, uint8 ``[layers, num_blocks, block_bytes]``, on huge pages where the system gives them: a
    step reads blocks from all over the cache, and an address that is looked up anew costs as much as a line."""
    return large_empty((layers, num_blocks, block_bytes), torch.empty(0, dtype=torch.uint8, device="cpu"))


def kv_write(
    blocks: Tensor,
    layout: KVLayout,
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
) -> None:
    """Write the keys and values of a step's tokens, the last ones of each sequence's context, to one layer's blocks.

    The slots behind a sequence's last token are cleared up to a multiple of 16, so the bytes of a cache that was rolled
    back and rewritten are those of a fresh one up to there.

    Args:
        blocks: uint8 ``[num_blocks, layout.block_bytes]``, contiguous, written in place; need not be initialised.
        layout: of ``blocks``.
        k, v: ``[T, heads, D]``: float32 for a float32 cache, bfloat16 for a bfloat16 one, either for int8.
        block_table: int32 ``[B, max_blocks]``: token p of sequence b is slot ``p % block_size`` of block
            ``block_table[b, p // block_size]``.
        cu_seqlens: int32 ``[B + 1]``, from 0 ascending to T.
        context_lens: int32 ``[B]``: tokens per sequence, the step's included.

    Raises:
        ValueError: for a shape, type, offset, context or block outside the above, naming the argument.
    """
    _shape_of("kv_write", "k", k, layout, layout.heads)
    _write(blocks, layout.format, layout.block_size, k, v, block_table, cu_seqlens, context_lens)


def cached_attention(
    q: Tensor,
    blocks: Tensor,
    layout: KVLayout,
    block_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    *,
    window_left: int = -1,
    scale: float | None = None,
) -> Tensor:
    """Causal attention of each sequence's last queries over its keys and values in a cache; no gradients.

    Decoding, chunked prefill and the verification of drafts are one call. A row's bits depend on its query, the keys
    it sees and the instruction set alone: not on the other rows and sequences of the call, on how a prompt was cut into
    calls, on the blocks its context lies in or on the number of threads.

    Args:
        q: ``[T, Hq, D]``, Hq a multiple of ``layout.heads``; types as for :func:`kv_write`.
        blocks, layout, block_table, cu_seqlens, context_lens: as for :func:`kv_write`, which has written the keys and
            values of these rows.
        window_left: a row sees its own key and this many before it; -1: all.
        scale: of the scores; ``1 / sqrt(D)`` by default.

    Returns:
        ``[T, Hq, D]`` of q's type.

    Raises:
        ValueError: for an argument outside the above, naming it.
    """
    _shape_of("cached_attention", "q", q, layout)
    scale = 1 / math.sqrt(layout.head_dim) if scale is None else float(scale)
    out: Tensor = _attention(
        q, blocks, layout.format, layout.heads, layout.block_size, block_table, cu_seqlens, context_lens, window_left,
        scale,
    )  # fmt: skip
    return out


def _shape_of(op: str, name: str, x: Tensor, layout: KVLayout, heads: int | None = None) -> None:
    if x.dim() != 3 or x.shape[2] != layout.head_dim or (heads is not None and x.shape[1] != heads):
        expected = f"[T, {heads or 'Hq'}, {layout.head_dim}]"
        raise ValueError(f"{op}: {name}: expected {expected}, got {list(x.shape)}")


# --- the ops ----------------------------------------------------------------------------------------------------------


def _native_write(
    blocks: Tensor, format: str, block_size: int, k: Tensor, v: Tensor, table: Tensor, cu: Tensor, lens: Tensor
) -> None:
    _C.kv_write(blocks, format, block_size, k, v, table, cu, lens)


def _fake_write(*_: object) -> None:
    pass


def _native_attention(
    q: Tensor,
    blocks: Tensor,
    format: str,
    heads: int,
    block_size: int,
    table: Tensor,
    cu: Tensor,
    lens: Tensor,
    window_left: int,
    scale: float,
) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype)
    _C.cached_attention(q, blocks, format, heads, block_size, table, cu, lens, window_left, scale, out)
    return out


def _fake_attention(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


_CUDA_IS = Implementation("none", "the layout is that of the CPU kernels; paged_attention serves CUDA")
_ROWS = "Tensor block_table, Tensor cu_seqlens, Tensor context_lens"
_write = define(
    f"kv_write(Tensor(a!) blocks, str format, int block_size, Tensor k, Tensor v, {_ROWS}) -> ()",
    fake=_fake_write,
    cpu=_native_write,
    cuda_is=_CUDA_IS,
)
_attention = define(
    f"cached_attention(Tensor q, Tensor blocks, str format, int heads, int block_size, {_ROWS}, int window_left, "
    "float scale) -> Tensor",
    fake=_fake_attention,
    cpu=_native_attention,
    cuda_is=_CUDA_IS,
)
