"""A decoder's step over cached keys and values, all layers in one native call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from fastsft import _C
from fastsft.ops._registry import Implementation, record
from fastsft.ops.matvec import PackedWeight

Weight = TypeVar("Weight")
"""A matrix in the form that one kind of step reads: packed here, as a device holds it in ``models/device.py``."""


@dataclass(frozen=True)
class DecoderLayer(Generic[Weight]):
    """One layer's weights; D hidden size, H query heads, G key heads, K head size, F MLP width. Vectors are float32
    beside packed weights."""

    attention_norm: Tensor  # [D]
    qkv: Weight  # [(H + 2 G) K, D]: the queries' channels, the keys', the values'
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # [K]
    k_norm: Tensor | None
    o: Weight  # [D, H K]
    o_bias: Tensor | None
    mlp_norm: Tensor  # [D]
    gate_up: Weight  # [2 F, D]: the gate's channels, then those of `up`
    gate_up_bias: Tensor | None
    down: Weight  # [D, F]
    down_bias: Tensor | None
    window_left: int  # keys seen before a token's own; -1: all


@dataclass(frozen=True)
class LowRank(Generic[Weight]):
    """What an adapter adds to a product with x: b (a x), each product rounded to the activations' type.

    Of products that are stacked, as in ``qkv``, a stacks theirs, and b has theirs on its diagonal.
    """

    a: Weight  # [rank, K]
    b: Weight  # [N, rank], the adapter's scale in it


@dataclass(frozen=True)
class AdapterLayer(Generic[Weight]):
    """One layer's additions; None where nothing is added."""

    qkv: LowRank[Weight] | None
    o: LowRank[Weight] | None
    gate_up: LowRank[Weight] | None
    down: LowRank[Weight] | None


class DecoderWeights:
    """Everything :func:`decoder_step` multiplies with. The tensors may be overwritten in place between steps.

    Args:
        embedding: [V, D], float32 or bfloat16: the type of activations.
        layers: first to last.
        norm: float32 [D].
        head: [V, D].
        heads, kv_heads, head_dim, eps: H, G, K and the norms' epsilon.
        rotary: int64 positions [P] -> cos, sin [P, K / 2] in the embedding's type.

    Raises:
        ValueError: shapes or types that do not fit each other, naming the argument.
    """

    def __init__(
        self,
        embedding: Tensor,
        layers: Sequence[DecoderLayer[PackedWeight]],
        norm: Tensor,
        head: PackedWeight,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        eps: float,
        rotary: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> None:
        self.embedding, self.layers, self.norm, self.head = embedding, tuple(layers), norm, head
        width = self.layers[0].down.shape[1] if self.layers else 0
        self.native = _C.Decoder(embedding, norm, head, heads, kv_heads, head_dim, width, eps)
        for layer in self.layers:
            self.native.add_layer(layer)
        self._rotary = rotary
        self._angles = rotary(torch.arange(0))

    def angles(self, positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin of at least the first ``positions`` positions; the table doubles when it is too short."""
        if positions > len(self._angles[0]):
            self._angles = self._rotary(torch.arange(max(1024, 1 << (positions - 1).bit_length())))
        return self._angles

    def kv_block_bytes(self, kv_format: str, block_size: int) -> int:
        """Bytes of a layer's cache block: see :func:`decoder_step`."""
        return self.native.kv_block_bytes(kv_format, block_size)


class DecoderAdapter:
    """An adapter (LoRA, arXiv 2106.09685) of these weights, for the sequences that :func:`decoder_step` names.

    Raises:
        ValueError: another number of layers, or shapes that do not fit the weights.
    """

    def __init__(self, weights: DecoderWeights, layers: Sequence[AdapterLayer[PackedWeight]]) -> None:
        self.native = weights.native.adapter(list(layers))


def decoder_step(
    weights: DecoderWeights,
    ids: Tensor,
    cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    wanted: Tensor,
    *,
    kv_format: str,
    block_size: int,
    adapters: Sequence[DecoderAdapter | None] = (),
    hidden: Tensor | None = None,
) -> Tensor:
    """Compute the next tokens of some sequences: their keys and values go to the cache, logits of some rows come back.

    A row's logits, and the bytes it leaves in the cache, are the same whatever shares the step, however a prompt was
    split into steps and on any number of threads; they depend on the weights, the sequence's adapter, its tokens and
    the instruction set.

    Args:
        weights: the model.
        ids: int64 [T], the tokens of sequence b at [cu_seqlens[b], cu_seqlens[b + 1]).
        cache: uint8 [layers, num_blocks, weights.kv_block_bytes(kv_format, block_size)]; need not be initialised.
        block_table: int32 [B, M]: token p of a sequence is in its block p // block_size.
        cu_seqlens: int32 [B + 1].
        context_lens: int32 [B]: each sequence's tokens, those of this step included.
        wanted: int64 [R], rows of the step.
        kv_format: "float32" or "bfloat16", as the activations are, or "int8".
        block_size: tokens of a block, a multiple of 16.
        adapters: of each sequence, or none at all; neighbours with the same one go through it together.
        hidden: [R, D] in the embedding's type, filled with the rows' hidden states after the final norm.

    Returns:
        float32 [R, V].

    Raises:
        ValueError: shapes, types, ids, blocks or rows out of contract, naming the argument; nothing has been written.
    """
    logits = torch.empty(wanted.shape[0], weights.embedding.shape[0], dtype=torch.float32)
    cos, sin = weights.angles(max(context_lens.tolist(), default=0))
    weights.native.step(
        ids, cos, sin, kv_format, cache, block_size, cu_seqlens, context_lens, block_table,
        [a.native if a else None for a in adapters], wanted, logits, hidden,
    )  # fmt: skip
    return logits


record(
    "decoder_step",
    cpu=Implementation("native", "C++, packed weights and a cache in the kernels' layout"),
    cuda=Implementation(
        "torch", "one op after the other, as a CUDA graph where few tokens are computed; not yet run on a GPU"
    ),
)
