"""A decoder with its weights packed for inference: prompts, single tokens and drafts through the same kernels."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from fastsft.models.config import ModelConfig
from fastsft.models.decoder import Decoder
from fastsft.models.lora import lora_layers
from fastsft.models.rope import RotaryTable
from fastsft.models.stored import check_tied, match, open_tensors
from fastsft.ops.decoder import DecoderAdapter, DecoderLayer, DecoderWeights, decoder_step
from fastsft.ops.matvec import FORMATS, PackedWeight, pack_weight


class PackedDecoder:
    """Weights in the order the kernels read them, and the step over a cache. Build it with :func:`pack_decoder`."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights, format: str, head_format: str, group: int) -> None:
        self.config, self.weights = config, weights
        self.format, self.head_format, self.group = format, head_format, group

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.weights.embedding.dtype

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
        shape = (self.config.num_hidden_layers, num_blocks, self.cache_block_bytes(kv_format, block_size))
        return torch.empty(shape, dtype=torch.uint8)

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

    def update(self, model: Decoder | str | os.PathLike[str]) -> None:
        """Take over another state of the same model, into the same memory.

        Args:
            model: a decoder on the CPU, or a Hugging Face folder.

        Raises:
            ValueError: sizes that differ from this model's, before anything is changed.
        """
        with ExitStack() as stack:
            source = _Source(model, stack)
            check_sizes("update", self.config, source.config)
            _Packer(source, self.group, self.weights).all(self.format, self.head_format)


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
        model: a decoder on the CPU, with or without adapters, or a Hugging Face folder.
        format: of the layers: "float32", "bfloat16", "int8", "w8a8" or "int4" (see ``ops.pack_weight``).
        head_format: of the language model head; None: as ``format``.
        group: 32 or 64; of int4.

    Raises:
        ValueError: an unknown format, a model that is not on the CPU, a head size that the cache has no layout for (not
            a multiple of 16, or over 256), or a folder that cannot be read.
    """
    head_format = head_format or format
    for name, value in (("format", format), ("head_format", head_format)):
        if value not in FORMATS:
            raise ValueError(f"pack_decoder: {name}: expected one of {', '.join(FORMATS)}, got {value!r}")
    with ExitStack() as stack:
        source = _Source(model, stack)
        size = source.config.head_dim
        if size % 16 or size > 256:
            raise ValueError(f"pack_decoder: head_dim: expected a multiple of 16 up to 256, got {size}")
        weights = _Packer(source, group, None).all(format, head_format)
    return PackedDecoder(source.config, weights, format, head_format, group)


def check_sizes(what: str, mine: ModelConfig, its: ModelConfig) -> None:
    """Raise a ValueError for the first thing that another state of a model has to share with it and does not."""
    names = (
        "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "qkv_bias", "o_bias", "mlp_bias",
        "qk_norm", "windows", "rope",
    )  # fmt: skip
    for name in names:
        if (got := getattr(its, name)) != (expected := getattr(mine, name)):
            raise ValueError(f"{what}: model: expected {name}={expected}, got {got}")


class _Source:
    """A model's tensors by the names of our parameters: from memory, adapters added in, or from its folder."""

    config: ModelConfig
    read: Callable[[str], Tensor]

    def __init__(self, model: Decoder | str | os.PathLike[str], stack: ExitStack) -> None:
        if isinstance(model, Decoder):
            self.config = model.config
            parameters = dict(model.named_parameters())
            if model.lm_head_weight.device.type != "cpu":
                device = model.lm_head_weight.device
                raise ValueError(f"model: expected on the CPU (the engine has no other path), got {device}")
            adapted = {f"{name}.weight": layer for name, layer in lora_layers(model)}
            self.read = lambda name: adapted[name].effective_weight() if name in adapted else parameters[name].detach()
            return
        folder = Path(model)
        if not folder.is_dir():
            raise ValueError(f"{folder}: expected a folder with config.json and *.safetensors")
        self.config = ModelConfig.from_file(folder / "config.json")
        with torch.device("meta"):
            empty = Decoder(self.config)
        stored = open_tensors(folder, stack)
        places = {id(parameter): name for name, parameter in match(empty, stored, folder).items()}
        check_tied(self.config, stored)
        parameters = dict(empty.named_parameters())
        self.read = lambda name: stored[places[id(parameters[name])]].read()


class _Packer:
    """Packs every tensor of a source, into the memory of ``old`` weights where there are any."""

    def __init__(self, source: _Source, group: int, old: DecoderWeights | None) -> None:
        self.source, self.group, self.old = source, group, old

    def all(self, format: str, head_format: str) -> DecoderWeights:
        config, read, old = self.source.config, self.source.read, self.old
        dtype = torch.float32 if format == "float32" else torch.bfloat16
        embedding = old.embedding if old else torch.empty(config.vocab_size, config.hidden_size, dtype=dtype)
        embedding.copy_(read("embed_tokens.weight"))
        layers = [self.layer(i, format, old.layers[i] if old else None) for i in range(config.num_hidden_layers)]
        norm = self.vector(["norm.weight"], old.norm if old else None)
        head_name = "embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        head = self.matrix([head_name], head_format, old.head if old else None)
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

    def layer(self, i: int, format: str, old: DecoderLayer | None) -> DecoderLayer:
        config = self.source.config

        def matrix(field: str, *names: str) -> PackedWeight:
            found = [f"layers.{i}.{name}.weight" for name in names]
            return self.matrix(found, format, getattr(old, field) if old else None)

        def vector(field: str, *names: str) -> Tensor:
            return self.vector([f"layers.{i}.{name}" for name in names], getattr(old, field) if old else None)

        qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        gate_up = ("mlp.gate_proj", "mlp.up_proj")
        window = config.windows[i]
        return DecoderLayer(
            attention_norm=vector("attention_norm", "input_layernorm.weight"),
            qkv=matrix("qkv", *qkv),
            qkv_bias=vector("qkv_bias", *(f"{name}.bias" for name in qkv)) if config.qkv_bias else None,
            q_norm=vector("q_norm", "self_attn.q_norm.weight") if config.qk_norm else None,
            k_norm=vector("k_norm", "self_attn.k_norm.weight") if config.qk_norm else None,
            o=matrix("o", "self_attn.o_proj"),
            o_bias=vector("o_bias", "self_attn.o_proj.bias") if config.o_bias else None,
            mlp_norm=vector("mlp_norm", "post_attention_layernorm.weight"),
            gate_up=matrix("gate_up", *gate_up),
            gate_up_bias=vector("gate_up_bias", *(f"{name}.bias" for name in gate_up)) if config.mlp_bias else None,
            down=matrix("down", "mlp.down_proj"),
            down_bias=vector("down_bias", "mlp.down_proj.bias") if config.mlp_bias else None,
            window_left=-1 if window is None else window[0],
        )

    def matrix(self, names: list[str], format: str, old: PackedWeight | None) -> PackedWeight:
        return pack_weight([self.source.read(name) for name in names], format, group=self.group, out=old)

    def vector(self, names: list[str], old: Tensor | None) -> Tensor:
        new = torch.cat([self.source.read(name).float() for name in names])
        return new if old is None else old.copy_(new)
