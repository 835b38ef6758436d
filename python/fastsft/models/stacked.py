"""A model's weights as an engine stacks them: queries, keys and values in one matrix, the MLP's gate and up in one."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any, Generic, Protocol

import torch
from torch import Tensor

from fastsft.models.config import ModelConfig
from fastsft.models.decoder import Decoder
from fastsft.models.lora import lora_layers
from fastsft.models.skeleton import skeleton
from fastsft.models.stored import check_tied, match, open_tensors
from fastsft.ops.decoder import DecoderLayer, Weight

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size, in bytes


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


class Tensors:
    """A model's tensors by the names of our parameters: from its folder, or from memory, wherever they are there, with
    adapters added in."""

    config: ModelConfig
    read: Callable[[str], Tensor]

    def __init__(self, model: Decoder | str | os.PathLike[str], stack: ExitStack) -> None:
        if isinstance(model, Decoder):
            self.config = model.config
            parameters = dict(model.named_parameters())
            adapted = {f"{name}.weight": layer for name, layer in lora_layers(model)}
            self.read = lambda name: adapted[name].effective_weight() if name in adapted else parameters[name].detach()
            return
        folder = Path(model)
        if not folder.is_dir():
            raise ValueError(f"{folder}: expected a folder with config.json and *.safetensors")
        self.config = ModelConfig.from_file(folder / "config.json")
        with skeleton():
            empty = Decoder(self.config)
        stored = open_tensors(folder, stack)
        places = {id(parameter): name for name, parameter in match(empty, stored, folder).items()}
        check_tied(self.config, stored)
        parameters = dict(empty.named_parameters())
        self.read = lambda name: stored[places[id(parameters[name])]].read()


class Replaceable:
    """A model whose weights are written over while it is used.

    Attributes:
        whole: False where that was cut short: the weights are partly old, partly new.
    """

    whole = True

    def check_whole(self) -> None:
        """Raise a RuntimeError for weights that are no model's."""
        if not self.whole:
            raise RuntimeError("the last update of the weights was cut short, and they are partly new: update again")


class Held(Protocol[Weight]):
    """What a step's weights have in common."""

    embedding: Tensor
    layers: tuple[DecoderLayer[Weight], ...]
    norm: Tensor
    head: Weight


class Stacker(ABC, Generic[Weight]):
    """Makes every weight of a step from a model's tensors, into the memory of old ones where there are any."""

    def __init__(self, tensors: Tensors, format: str) -> None:
        self.tensors, self.config, self.format = tensors, tensors.config, format

    @abstractmethod
    def matrix(self, names: list[str], format: str, old: Weight | None) -> Weight:
        """The tensors of these names, stacked along their output channels."""

    @abstractmethod
    def vector(self, names: list[str], old: Tensor | None) -> Tensor:
        """The same of biases and norms."""

    def head(self, format: str, old: Weight | None) -> Weight:
        tied = self.config.tie_word_embeddings
        return self.matrix(["embed_tokens.weight" if tied else "lm_head.weight"], format, old)

    @torch.inference_mode()
    def check_made(self, what: str, held: Held[Weight], head_format: str) -> None:
        """Raise a ValueError if ``held`` is not what would be made of the tensors now. Takes the memory of one layer,
        or of the head."""
        if not all(self._compared(held, head_format)):
            raise ValueError(
                f"{what}: model: expected the weights of the engine, got others, or what became of them since "
                "update_weights(model)"
            )

    def _compared(self, held: Held[Weight], head_format: str) -> Iterator[bool]:
        embedding = self.tensors.read("embed_tokens.weight")
        yield _equal(embedding.to(held.embedding), held.embedding)
        yield _equal(self.vector(["norm.weight"], None), held.norm)
        made = None
        for i, layer in enumerate(held.layers):
            made = self.layer(i, made)
            yield _equal(made, layer)
        if not (self.config.tie_word_embeddings and embedding.dtype == held.embedding.dtype):
            yield _equal(self.head(head_format, None), held.head)

    def layer(self, i: int, old: DecoderLayer[Weight] | None) -> DecoderLayer[Weight]:
        config = self.config

        def matrix(field: str, *names: str) -> Weight:
            found = [f"layers.{i}.{name}.weight" for name in names]
            return self.matrix(found, self.format, getattr(old, field) if old else None)

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


class Trial(Stacker[None]):
    """Looks for what an update cannot take over, before it changes anything: names, shapes and types were held against
    the model when the tensors were opened, so that this is only what cannot be quantised."""

    def all(self, head_format: str) -> None:
        """Raises a ValueError for a NaN or infinity that is to be quantised."""
        for i in range(self.config.num_hidden_layers):
            self.layer(i, None)
        self.head(head_format, None)

    def matrix(self, names: list[str], format: str, old: None) -> None:
        for name in names if format not in ("float32", "bfloat16") else ():
            if not bool(torch.stack(self.tensors.read(name).aminmax()).isfinite().all()):
                raise ValueError(f"update: model: {name}: expected finite numbers for {format}, got others")

    def vector(self, names: list[str], old: Tensor | None) -> Tensor:
        return torch.empty(0)


def _equal(a: Any, b: Any) -> bool:
    """Of tensors, weights and layers, to the bit."""
    if isinstance(a, Tensor):
        # eight bytes at a time, where these are whole: torch compares bytes one by one
        whole = all(t.nbytes % 8 == t.storage_offset() * t.element_size() % 8 == 0 for t in (a, b))
        integers = torch.int64 if whole else _INTEGERS[a.element_size()]
        return torch.equal(*(t.flatten().view(integers) for t in (a, b)))
    if hasattr(a, "__dataclass_fields__"):
        return all(_equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(a))
    return bool(a == b)
