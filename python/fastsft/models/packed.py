"""A decoder with its weights packed for inference: prompts, single tokens and drafts through the same kernels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from fastsft.models.config import ModelConfig
from fastsft.models.decoder import Decoder
from fastsft.models.rope import RotaryTable
from fastsft.models.stacked import Replaceable, Stacker, Tensors, Trial, check_sizes
from fastsft.ops._memory import HugePages
from fastsft.ops.decoder import DecoderAdapter, DecoderWeights, decoder_step
from fastsft.ops.kv_cache import empty_blocks
from fastsft.ops.matvec import FORMATS, PackedWeight, empty_packed, pack_weight


class PackedDecoder(Replaceable):
    """Weights in the order the kernels read them, and the step over a cache. Build it with :func:`pack_decoder`."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights, format: str, head_format: str, group: int) -> None:
        self.config, self.weights = config, weights
        self.format, self.head_format, self.group = format, head_format, group

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.weights.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.weights.embedding.device

    @property
    def nbytes(self) -> int:
        """What a step of one token reads of the weights."""
        total = self.weights.head.nbytes
        for layer in self.weights.layers:
            total += layer.qkv.nbytes + layer.o.nbytes + layer.gate_up.nbytes + layer.down.nbytes
        return total

    def cache_block_bytes(self, kv_format: str, block_size: int) -> int:
        """Of one block in one layer; a cache is uint8 [layers, num_blocks, this]."""
        return self.weights.kv_block_bytes(kv_format, block_size)

    def new_cache(self, num_blocks: int, *, kv_format: str, block_size: int) -> Tensor:
        """A cache of ``num_blocks`` blocks, uninitialised."""
        return empty_blocks(self.config.num_hidden_layers, num_blocks, self.cache_block_bytes(kv_format, block_size))

    def step(
        self,
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
        """Logits float32 [R, V] of the rows ``wanted``; see :func:`fastsft.ops.decoder.decoder_step`."""
        return decoder_step(
            self.weights, ids, cache, block_table, cu_seqlens, context_lens, wanted,
            kv_format=kv_format, block_size=block_size, adapters=adapters, hidden=hidden,
        )  # fmt: skip

    @torch.inference_mode()
    def update(self, model: Decoder | str | os.PathLike[str]) -> None:
        """Take over another state of the same model, into the same memory.

        What cannot be taken over is found in a first pass, which changes nothing. An error that comes in the second one
        all the same (no memory, an interruption) leaves :attr:`whole` False.

        Args:
            model: a decoder, or a Hugging Face folder.

        Raises:
            ValueError: sizes that differ from this model's, a NaN or infinity to be quantised.
        """
        with ExitStack() as stack:
            tensors = Tensors(model, stack)
            check_sizes("update", self.config, tensors.config)
            Trial(tensors, self.format).all(self.head_format)
            self.whole = False
            _Packer(tensors, self.format, self.group).all(self.head_format, self.weights)
        self.whole = True

    def check_has(self, what: str, model: Decoder) -> None:
        """Raise a ValueError, in the name of ``what``, unless :meth:`update` with the model would change nothing."""
        with ExitStack() as stack:
            tensors = Tensors(model, stack)
            check_sizes(what, self.config, tensors.config)
            _Packer(tensors, self.format, self.group).check_made(what, self.weights, self.head_format)


def pack_decoder(
    model: Decoder | str | os.PathLike[str],
    format: str = "bfloat16",
    *,
    head_format: str | None = None,
    group: int = 32,
) -> PackedDecoder:
    """Pack a model, one layer at a time: a folder's memory peaks at one layer beyond the result.

    Activations are float32 with float32 weights and bfloat16 otherwise.

    Args:
        model: a decoder, with or without adapters, or a Hugging Face folder.
        format: of the layers: "float32", "bfloat16", "int8", "w8a8" or "int4" (see ``ops.pack_weight``).
        head_format: of the language model head; None: as ``format``.
        group: 32 or 64; of int4.

    Raises:
        ValueError: an unknown format, a head size that the cache has no layout for (not a multiple of 16, or over 256),
            or a folder that cannot be read.
    """
    head_format = head_format or format
    for name, value in (("format", format), ("head_format", head_format)):
        if value not in FORMATS:
            raise ValueError(f"pack_decoder: {name}: expected one of {', '.join(FORMATS)}, got {value!r}")
    with ExitStack() as stack:
        tensors = Tensors(model, stack)
        size = tensors.config.head_dim
        if size % 16 or size > 256:
            raise ValueError(f"pack_decoder: head_dim: expected a multiple of 16 up to 256, got {size}")
        weights = _Packer(tensors, format, group).all(head_format)
    return PackedDecoder(tensors.config, weights, format, head_format, group)


class _Packer(Stacker[PackedWeight]):
    def __init__(self, tensors: Tensors, format: str, group: int) -> None:
        super().__init__(tensors, format)
        self.group = group
        self.memory = HugePages()

    def all(self, head_format: str, old: DecoderWeights | None = None) -> DecoderWeights:
        config = self.config
        dtype = torch.float32 if self.format == "float32" else torch.bfloat16
        embedding = old.embedding if old else torch.empty(config.vocab_size, config.hidden_size, dtype=dtype)
        embedding.copy_(self.tensors.read("embed_tokens.weight"))
        layers = [self.layer(i, old.layers[i] if old else None) for i in range(config.num_hidden_layers)]
        norm = self.vector(["norm.weight"], old.norm if old else None)
        head = self.head(head_format, old.head if old else None)
        if old:
            return old
        rotary = RotaryTable(config.rope, config.head_dim)
        return DecoderWeights(
            embedding,
            layers,
            norm,
            head,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
            rotary=lambda positions: rotary(positions, dtype),
        )

    def matrix(self, names: list[str], format: str, old: PackedWeight | None) -> PackedWeight:
        parts = [self.tensors.read(name).cpu() for name in names]
        if old is None:
            shape = (sum(map(len, parts)), parts[0].shape[1])
            old = empty_packed(format, shape, self.group, self.memory.empty)
        return pack_weight(parts, format, group=self.group, out=old)

    def vector(self, names: list[str], old: Tensor | None) -> Tensor:
        new = torch.cat([self.tensors.read(name).float().cpu() for name in names])
        return new if old is None else old.copy_(new)
