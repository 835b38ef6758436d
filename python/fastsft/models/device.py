"""A decoder's weights on a device and its step over a paged cache, in ops that any device has.

Shape suffixes: T rows of the step, D hidden size, H query heads, G key heads, K head size, R rows wanted, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fastsft import ops
from fastsft.models.config import ModelConfig
from fastsft.models.decoder import Decoder
from fastsft.models.rope import RotaryTable
from fastsft.models.stacked import Replaceable, Stacker, Tensors, Trial, check_sizes
from fastsft.models.stacked_adapter import stack_adapter
from fastsft.ops._attention_inputs import HEAD_DIMS
from fastsft.ops.activation import swiglu_halves
from fastsft.ops.decoder import AdapterLayer, DecoderLayer, LowRank
from fastsft.ops.device_linear import FORMATS, DeviceWeight, device_linear, device_logits, hold_weight


@dataclass(frozen=True)
class Rows:
    """What a step computes, on the device. Row t is a token of one of B sequences."""

    ids_T: Tensor
    """int32 or int64."""
    positions_T: Tensor
    """int32 or int64: each token's place in its sequence."""
    slots_T: Tensor
    """int32 or int64: where in the cache its key and value go: block times block size, and the place in the block."""
    block_table: Tensor
    """int32 [B, M], as of ``ops.paged_attention``, like the two that follow."""
    cu_seqlens: Tensor
    context_lens_B: Tensor


@dataclass(frozen=True)
class DeviceAdapter:
    """An adapter (LoRA) of a :class:`DeviceDecoder`, a layer's additions each."""

    layers: tuple[AdapterLayer[DeviceWeight], ...]


Span = tuple[int, int, DeviceAdapter]
"""Rows [begin, end) of a step that go through an adapter."""


class DeviceDecoder(Replaceable):
    """Build it with :func:`place_decoder`. Tensors keep their addresses for life: graphs of the step stay valid."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: Tensor,
        layers: Sequence[DecoderLayer[DeviceWeight]],
        norm: Tensor,
        head: DeviceWeight,
        format: str,
        group: int,
    ) -> None:
        self.config, self.embedding, self.layers, self.norm, self.head = config, embedding, tuple(layers), norm, head
        self.format, self.group = format, group
        self._rotary = RotaryTable(config.rope, config.head_dim)

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations and the cache."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def nbytes(self) -> int:
        """What a step of one token reads of the weights."""
        matrices = [w for layer in self.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        return sum(w.nbytes for w in [self.head, *matrices])

    def cache_block_bytes(self, block_size: int) -> int:
        """Of one block in all layers."""
        config = self.config
        per_token = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
        return per_token * block_size * self.dtype.itemsize

    def new_cache(self, num_blocks: int, block_size: int) -> Tensor:
        """[layers, 2, num_blocks, block_size, G, K]: keys and values. Zeros: a value that nothing has written yet is
        multiplied by a probability of 0, which would not hide a NaN."""
        config = self.config
        shape = (config.num_hidden_layers, 2, num_blocks, block_size, config.num_key_value_heads, config.head_dim)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def hidden(self, rows: Rows, cache: Tensor, spans: Sequence[Span] = ()) -> Tensor:
        """Write the rows' keys and values to the cache; [T, D] after the final norm.

        All keys and values of a layer are written before any row attends. Nothing waits for the device, so that a graph
        can hold the call, but for ``ops.paged_attention`` where plain torch serves it.
        """
        eps = self.config.rms_norm_eps
        cos, sin = self._rotary(rows.positions_T, self.dtype)
        x_TD = functional.embedding(rows.ids_T, self.embedding)
        slots_T = rows.slots_T.long()
        for layer, kv, own in zip(self.layers, cache, self._additions(spans), strict=True):
            h_TD = ops.rms_norm(x_TD, layer.attention_norm, eps)
            qkv = _product(h_TD, layer.qkv, layer.qkv_bias, [(b, e, a.qkv) for b, e, a in own])
            out_THK = self._attend(layer, qkv, cos, sin, rows, slots_T, kv)
            x_TD = x_TD + _product(out_THK.flatten(1), layer.o, layer.o_bias, [(b, e, a.o) for b, e, a in own])
            h_TD = ops.rms_norm(x_TD, layer.mlp_norm, eps)
            gate_up = _product(h_TD, layer.gate_up, layer.gate_up_bias, [(b, e, a.gate_up) for b, e, a in own])
            h_TF = swiglu_halves(gate_up)
            x_TD = x_TD + _product(h_TF, layer.down, layer.down_bias, [(b, e, a.down) for b, e, a in own])
        return ops.rms_norm(x_TD, self.norm, eps)

    def logits(self, hidden_RD: Tensor, *, out: Tensor | None = None) -> Tensor:
        """float32 [R, V], in ``out`` if it is given."""
        if out is None:
            out = hidden_RD.new_empty(len(hidden_RD), self.head.shape[0], dtype=torch.float32)
        device_logits(hidden_RD, self.head, out)
        return out

    @torch.inference_mode()
    def update(self, model: Decoder | str | os.PathLike[str]) -> None:
        """Take over another state of the same model, into the same memory: at most a tile of a matrix is there twice.

        What cannot be taken over is found in a first pass, which changes nothing. An error that comes in the second one
        all the same (no memory, an interruption) leaves :attr:`whole` False.

        Args:
            model: a decoder on any device, or a Hugging Face folder.

        Raises:
            ValueError: sizes that differ from this model's, a NaN or infinity to be quantised.
        """
        with ExitStack() as stack:
            tensors = Tensors(model, stack)
            check_sizes("update", self.config, tensors.config)
            Trial(tensors, self.format).all(self.format)
            self.whole = False
            _Holder(tensors, self.format, self.group, self.device).all(self)
            if self.embedding.is_cuda:  # errors come here, and other streams see the new weights
                torch.cuda.synchronize(self.device)
        self.whole = True

    def check_has(self, what: str, model: Decoder) -> None:
        """Raise a ValueError, in the name of ``what``, unless :meth:`update` with the model would change nothing."""
        with ExitStack() as stack:
            tensors = Tensors(model, stack)
            check_sizes(what, self.config, tensors.config)
            _Holder(tensors, self.format, self.group, self.device).check_made(what, self, self.format)

    def _additions(self, spans: Sequence[Span]) -> list[list[tuple[int, int, AdapterLayer[DeviceWeight]]]]:
        """Of each layer."""
        return [[(b, e, adapter.layers[i]) for b, e, adapter in spans] for i in range(len(self.layers))]

    def _attend(
        self,
        layer: DecoderLayer[DeviceWeight],
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        rows: Rows,
        slots_T: Tensor,
        kv: Tensor,
    ) -> Tensor:
        """``kv`` [2, num_blocks, block_size, G, K] of the layer -> [T, H, K]."""
        config = self.config
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        turned, v_TGK = qkv.view(len(qkv), -1, config.head_dim).split_with_sizes([heads + groups, groups], 1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q_THK, k_TGK = turned.split_with_sizes([heads, groups], 1)
            q_THK = ops.rms_norm(q_THK, layer.q_norm, config.rms_norm_eps)
            k_TGK = ops.rms_norm(k_TGK, layer.k_norm, config.rms_norm_eps)
            turned = torch.cat([q_THK, k_TGK], 1)
        q_THK, k_TGK = ops.apply_rope(turned, cos, sin).split_with_sizes([heads, groups], 1)
        for slots, new in zip(kv.flatten(1, 2), (k_TGK, v_TGK), strict=True):
            slots.index_copy_(0, slots_T, new)
        window = None if layer.window_left < 0 else (layer.window_left, 0)
        return ops.paged_attention(
            q_THK, kv[0], kv[1], rows.block_table, rows.cu_seqlens, rows.context_lens_B, window=window
        )


def place_decoder(
    model: Decoder | str | os.PathLike[str],
    format: str = "bfloat16",
    *,
    group: int = 32,
    device: torch.device | str,
) -> DeviceDecoder:
    """Copy a model to a device, one tensor at a time. Activations are float32 with float32 weights, else bfloat16.

    Args:
        model: a decoder on any device, with or without adapters, or a Hugging Face folder.
        format: of the weights: "float32", "bfloat16", "int8" or "int4" (see ``ops.pack_weight``).
        group: 32 or 64; of int4.

    Raises:
        ValueError: an unknown format, a head size that ``ops.paged_attention`` does not have, or a folder that cannot
            be read.
    """
    if format not in FORMATS:
        raise ValueError(f"place_decoder: format: expected one of {', '.join(FORMATS)}, got {format!r}")
    with ExitStack() as stack:
        tensors = Tensors(model, stack)
        if (size := tensors.config.head_dim) not in HEAD_DIMS:
            raise ValueError(f"place_decoder: head_dim: expected one of {HEAD_DIMS}, got {size}")
        return _Holder(tensors, format, group, torch.device(device)).all()


def place_adapter(model: DeviceDecoder, adapter: str | os.PathLike[str] | Decoder) -> DeviceAdapter:
    """An adapter for steps of ``model``, in the type of its activations.

    Args:
        adapter: PEFT's folder, or a decoder that has the adapter on it (its own weights are not read).

    Raises:
        ValueError: see :func:`fastsft.models.stacked_adapter.stack_adapter`.
    """
    format = str(model.dtype).removeprefix("torch.")
    return DeviceAdapter(tuple(stack_adapter(model.config, adapter, lambda w: hold_weight([w], format, model.device))))


class _Holder(Stacker[DeviceWeight]):
    def __init__(self, tensors: Tensors, format: str, group: int, device: torch.device) -> None:
        super().__init__(tensors, format)
        self.group, self.device = group, device
        self.dtype = torch.float32 if format == "float32" else torch.bfloat16

    def all(self, old: DeviceDecoder | None = None) -> DeviceDecoder:
        config = self.config
        embedding = self.vector(["embed_tokens.weight"], old.embedding if old else None)
        layers = [self.layer(i, old.layers[i] if old else None) for i in range(config.num_hidden_layers)]
        norm = self.vector(["norm.weight"], old.norm if old else None)
        if config.tie_word_embeddings and self.format in ("float32", "bfloat16"):
            head = DeviceWeight(
                self.format, (config.vocab_size, config.hidden_size), 0, embedding, embedding.new_empty(0)
            )
        else:
            head = self.head(self.format, old.head if old else None)
        return old or DeviceDecoder(config, embedding, layers, norm, head, self.format, self.group)

    def matrix(self, names: list[str], format: str, old: DeviceWeight | None) -> DeviceWeight:
        return hold_weight([self.tensors.read(name) for name in names], format, self.device, group=self.group, out=old)

    def vector(self, names: list[str], old: Tensor | None) -> Tensor:
        parts = [self.tensors.read(name) for name in names]
        size = sum(len(part) for part in parts)
        out = torch.empty(size, *parts[0].shape[1:], dtype=self.dtype, device=self.device) if old is None else old
        for part, place in zip(parts, out.split_with_sizes([len(part) for part in parts]), strict=True):
            place.copy_(part)
        return out


def _product(
    x: Tensor,
    weight: DeviceWeight,
    bias: Tensor | None,
    additions: Sequence[tuple[int, int, LowRank[DeviceWeight] | None]],
) -> Tensor:
    out = device_linear(x, weight, bias)
    for begin, end, low in additions:
        if low is not None:
            out[begin:end] += device_linear(device_linear(x[begin:end], low.a), low.b)
    return out
