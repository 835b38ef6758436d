"""A Hugging Face config.json read into the fields that the decoder needs; what it cannot compute exactly is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsft.models.rope import RopeConfig

Window = tuple[int, int]


@dataclass(frozen=True)
class _Family:
    """What a ``model_type`` fixes: in transformers part of the model class, or a default of its config class."""

    architecture: str
    max_position_embeddings: int
    qkv_bias: bool | None = None  # None: the key attention_bias decides, for q, k, v and o
    mlp_bias: bool | None = None  # None: the key mlp_bias decides
    qk_norm: bool = False
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    sliding_window: int | None = None
    layer_windows: bool = False  # use_sliding_window, max_window_layers and layer_types choose layer by layer


_FAMILIES = {
    "llama": _Family("LlamaForCausalLM", 2048),
    "mistral": _Family("MistralForCausalLM", 131072, qkv_bias=False, mlp_bias=False, sliding_window=4096),
    "qwen2": _Family("Qwen2ForCausalLM", 32768, qkv_bias=True, mlp_bias=False, sliding_window=4096, layer_windows=True),
    "qwen3": _Family(
        "Qwen3ForCausalLM",
        32768,
        mlp_bias=False,
        qk_norm=True,
        head_dim=128,
        sliding_window=4096,
        layer_windows=True,
    ),
}

# Features of other models that a config may carry. Their keys must be absent, null, false, 0 or empty.
_REFUSED = {
    "quantization_config": "quantized weights are",
    "num_experts": "a mixture of experts is",
    "num_local_experts": "a mixture of experts is",
    "n_routed_experts": "a mixture of experts is",
    "attn_logit_softcapping": "score soft-capping is",
    "final_logit_softcapping": "logit soft-capping is",
    "attention_sinks": "attention sinks are",
    "attention_dropout": "dropout is",
    "text_config": "a multimodal model is",
    "vision_config": "a multimodal model is",
}

# Every key that is read, and those that transformers writes beside them and that change nothing here.
KNOWN_KEYS = frozenset(_REFUSED) | {
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "tie_word_embeddings", "attention_bias",
    "mlp_bias", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "rope_theta",
    "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings",
    "max_position_embeddings", "initializer_range", "pad_token_id",
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "pretraining_tp", "torch_dtype",
    "transformers_version", "use_cache", "use_mrope",
}  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """One decoder's architecture. Build it with :meth:`from_hf` or :meth:`from_file`."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """RMS norm over each query's and key's head axis before the rotation (Qwen3)."""
    windows: tuple[Window | None, ...]
    """Per layer the (left, right) keys visible besides the query's own, None for all; sliding_window w: (w - 1, 0)."""
    rope: RopeConfig
    max_position_embeddings: int
    initializer_range: float
    pad_token_id: int | None
    source: dict[str, Any] = field(repr=False, hash=False)
    """Every key of the original config.json, in its order."""
    text: str | None = field(default=None, repr=False, compare=False)
    """The file as it was read, so that an unchanged configuration is written back byte for byte."""

    @staticmethod
    def from_hf(raw: Mapping[str, Any], where: str = "config") -> ModelConfig:
        """Read the keys of a config.json.

        Sizes must be given; other absent keys have transformers' defaults.

        Args:
            raw: config.json as a dict; copied.
            where: begins each error message (the file's path).

        Raises:
            ValueError: an unknown ``model_type``, a feature or rope type that is not supported, a missing or ill-typed
                value. The message names the key, what is supported and what came.
        """
        return _Parser(raw, where).parse()

    @staticmethod
    def from_file(path: Path) -> ModelConfig:
        """Read a config.json (UTF-8); see :meth:`from_hf`."""
        if not path.is_file() and (path.parent / "adapter_config.json").is_file():
            raise ValueError(f"{path.parent}: the folder of an adapter; expected that of a model")
        try:
            text = path.read_bytes().decode("utf-8")
            raw = json.loads(text)
        except OSError as error:
            raise ValueError(f"{path}: cannot read: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{path}: not valid JSON: {error}") from error
        if not isinstance(raw, dict):
            raise ValueError(f"{path}: expected a JSON object, got {type(raw).__name__}")
        if "model_type" not in raw and (path.parent / "model" / path.name).is_file():
            raise ValueError(f"{path.parent}: the folder of a run; its model is {path.parent / 'model'}")
        return dataclasses.replace(ModelConfig.from_hf(raw, str(path)), text=text)

    @property
    def architecture(self) -> str:
        """transformers' class for this model, e.g. ``LlamaForCausalLM``."""
        return _FAMILIES[self.model_type].architecture

    def to_hf(self) -> dict[str, Any]:
        """The original config.json keys with their values."""
        return copy.deepcopy(self.source)

    def to_json(self) -> str:
        """The text of config.json: as it was read where nothing changed."""
        return json.dumps(self.source, indent=2) + "\n" if self.text is None else self.text

    def with_keys(self, **changes: Any) -> ModelConfig:
        """A copy with config.json keys set; itself where they have these values already."""
        if all(key in self.source and self.source[key] == value for key, value in changes.items()):
            return self
        return ModelConfig.from_hf(self.source | changes)

    def with_dtype(self, dtype: str) -> ModelConfig:
        """A copy that declares ``dtype`` ("bfloat16") for the stored weights, if it declares one at all."""
        key = "dtype" if "dtype" in self.source else "torch_dtype"
        return self.with_keys(**{key: dtype}) if key in self.source else self


class _Parser:
    """Reads and checks one key after the other."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where

    def parse(self) -> ModelConfig:
        kind = self.raw.get("model_type")
        if not isinstance(kind, str) or kind not in _FAMILIES:
            raise self.error("model_type", f"one of {', '.join(_FAMILIES)}", kind)
        family = _FAMILIES[kind]
        self.refuse_features()
        heads = self.integer("num_attention_heads")
        # Absent, it means as many as query heads only for Llama: elsewhere transformers assumes one published size.
        optional = kind == "llama" or "num_key_value_heads" in self.raw
        kv_heads = self.integer("num_key_value_heads", heads if optional else None)
        if heads % kv_heads:
            raise self.error("num_key_value_heads", f"a divisor of num_attention_heads={heads}", kv_heads)
        hidden, layers = self.integer("hidden_size"), self.integer("num_hidden_layers", maximum=10_000)
        max_positions = self.integer("max_position_embeddings", family.max_position_embeddings)
        qkv_bias = self.bias("attention_bias", family.qkv_bias)
        vocab = self.integer("vocab_size")
        return ModelConfig(
            model_type=kind,
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=self.integer("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=self.head_dim(hidden, heads, family),
            rms_norm_eps=self.number("rms_norm_eps", 1e-6),
            tie_word_embeddings=self.boolean("tie_word_embeddings"),
            qkv_bias=qkv_bias,
            o_bias=qkv_bias and family.qkv_bias is None,
            mlp_bias=self.bias("mlp_bias", family.mlp_bias),
            qk_norm=family.qk_norm,
            windows=self.windows(layers, family),
            rope=RopeConfig.from_hf(self.raw, max_positions, self.where),
            max_position_embeddings=max_positions,
            initializer_range=self.number("initializer_range", 0.02),
            pad_token_id=self.pad_token_id(vocab),
            source=copy.deepcopy(dict(self.raw)),
        )

    def refuse_features(self) -> None:
        for key, feature in _REFUSED.items():
            if self.raw.get(key):
                raise ValueError(f"{self.where}: {key}: {feature} not supported, got {self.raw[key]!r}")
        act = self.raw.get("hidden_act", "silu")
        if act != "silu":
            raise self.error("hidden_act", "'silu'", act)

    def bias(self, key: str, fixed: bool | None) -> bool:
        """The key's value, or what the model class hard-codes; a key that contradicts the class is an error."""
        given = self.boolean(key)
        if fixed is None:
            return given
        if self.raw.get(key) is not None and given != fixed:
            raise self.error(key, f"{fixed} with model_type {self.raw['model_type']!r}", given)
        return fixed

    def head_dim(self, hidden: int, heads: int, family: _Family) -> int:
        if self.raw.get("head_dim") is None and family.head_dim is None and hidden % heads:
            raise self.error("hidden_size", f"a multiple of num_attention_heads={heads}, or head_dim given", hidden)
        size = self.integer("head_dim", family.head_dim or hidden // heads)
        if size % 2:
            raise self.error("head_dim", "an even number", size)
        return size

    def windows(self, layers: int, family: _Family) -> tuple[Window | None, ...]:
        if "sliding_window" in self.raw:
            size = self.integer("sliding_window") if self.raw["sliding_window"] is not None else None
        else:
            size = family.sliding_window
        if family.sliding_window is None:
            if size is not None:
                raise self.error("sliding_window", f"null with model_type {self.raw['model_type']!r}", size)
            kinds = ["full_attention"] * layers
        elif not family.layer_windows:
            kinds = ["full_attention" if size is None else "sliding_attention"] * layers
        else:
            if not self.boolean("use_sliding_window"):
                size = None
            first = self.integer("max_window_layers", 28, minimum=0)
            kinds = ["full_attention" if size is None or i < first else "sliding_attention" for i in range(layers)]
        given = self.raw.get("layer_types")
        if given is not None and given != kinds:
            if not family.layer_windows:
                raise self.error("layer_types", f"absent, or {kinds[0]!r} for each of {layers} layers", given)
            kinds = self.layer_types(given, layers, size)
        return tuple((size - 1, 0) if size and kind == "sliding_attention" else None for kind in kinds)

    def layer_types(self, given: Any, layers: int, size: int | None) -> list[str]:
        known = ("full_attention", "sliding_attention")
        if not isinstance(given, list) or len(given) != layers or any(kind not in known for kind in given):
            raise self.error("layer_types", f"{layers} of {' and '.join(known)}", given)
        if size is None and "sliding_attention" in given:
            raise self.error("layer_types", "full_attention only, as use_sliding_window is off", given)
        return given

    def pad_token_id(self, vocab: int) -> int | None:
        value = self.raw.get("pad_token_id")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not -vocab <= value < vocab:
            raise self.error("pad_token_id", f"an id below vocab_size={vocab}, or null", value)
        return value

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1, maximum: int = 2**31 - 1) -> int:
        value = self.raw.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self.error(key, f"an integer from {minimum} to {maximum}", value)
        return value

    def number(self, key: str, default: float) -> float:
        value = self.raw.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e9:
            raise self.error(key, "a number from 0 to 1e9", value)
        return float(value)

    def boolean(self, key: str) -> bool:
        value = self.raw.get(key)
        value = False if value is None else value
        if not isinstance(value, bool):
            raise self.error(key, "true or false", value)
        return value

    def error(self, key: str, expected: str, value: Any) -> ValueError:
        return ValueError(f"{self.where}: {key}: expected {expected}, got {value!r}")
