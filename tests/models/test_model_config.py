"""Reading config.json: every field against transformers, exact rope frequencies, and the refusals."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity_table import CASES, LLAMA3, TINY, YARN

from fastsft.models.config import KNOWN_KEYS, ModelConfig
from fastsft.models.rope import RotaryTable, inverse_frequencies

SIZES = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

# the rope and window keys of published models, as they stand in their config.json (transformers 4 style)
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama 2": {"model_type": "llama", "max_position_embeddings": 4096, "rope_scaling": None},
    "Llama 3.1": {
        "model_type": "llama",
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "head_dim": 128,
    },
    "deepseek-coder": {
        "model_type": "llama",
        "max_position_embeddings": 16384,
        "rope_scaling": {"factor": 4.0, "type": "linear"},
        "rope_theta": 100000,
    },
    "Yarn-Llama": {
        "model_type": "llama",
        "max_position_embeddings": 4096,
        "rope_scaling": {"factor": 16.0, "finetuned": True, "original_max_position_embeddings": 4096, "type": "yarn"},
    },
    "yarn without original_max_position_embeddings": {
        "model_type": "llama",
        "max_position_embeddings": 2048,
        "rope_scaling": {"factor": 2.0, "type": "yarn"},
    },
    "Qwen2.5-Coder": {
        "model_type": "qwen2",
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "use_sliding_window": False,
    },
    "Qwen2.5-Coder with yarn": {
        "model_type": "qwen2",
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    },
    "Qwen3": {
        "model_type": "qwen3",
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "Mistral 7B v0.1": {"model_type": "mistral", "max_position_embeddings": 32768, "sliding_window": 4096},
    "Mistral 7B v0.3": {"model_type": "mistral", "rope_theta": 1000000.0, "sliding_window": None},
    "defaults llama": {"model_type": "llama"},
    "defaults qwen2": {"model_type": "qwen2"},
    "defaults qwen3": {"model_type": "qwen3"},
    "defaults mistral": {"model_type": "mistral"},
}


def theirs_of(keys: dict[str, Any]) -> Any:
    transformers = pytest.importorskip("transformers")

    keys = copy.deepcopy(keys)
    return transformers.AutoConfig.for_model(keys.pop("model_type"), **keys)


def rotary_of(config: Any) -> Any:
    transformers = pytest.importorskip("transformers")

    with torch.device("meta"):
        kind = type(transformers.AutoModel.from_config(config).rotary_emb)
    return kind(config)


@pytest.mark.parametrize("keys", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_fields_equal_transformers(keys: dict[str, Any]) -> None:
    ours, theirs = ModelConfig.from_hf(SIZES | keys), theirs_of(SIZES | keys)
    for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "initializer_range",
        "pad_token_id",
    ):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.head_dim == getattr(theirs, "head_dim", 64)
    assert ours.architecture == f"{type(theirs).__name__.removesuffix('Config')}ForCausalLM"
    window = getattr(theirs, "sliding_window", None)
    everywhere = "sliding_attention" if window else "full_attention"
    kinds = getattr(theirs, "layer_types", None) or [everywhere] * 2
    assert ours.windows == tuple((window - 1, 0) if kind == "sliding_attention" else None for kind in kinds)


ROPES = PUBLISHED | {f"case {name}": keys for name, keys in CASES.items() if "rope" in name}


@pytest.mark.parametrize("keys", ROPES.values(), ids=ROPES.keys())
def test_rope_frequencies_are_the_same_bits(keys: dict[str, Any]) -> None:
    ours = ModelConfig.from_hf(SIZES | keys)
    theirs = rotary_of(theirs_of(SIZES | keys))
    assert torch.equal(inverse_frequencies(ours.rope, ours.head_dim), theirs.inv_freq)
    assert ours.rope.attention_factor == theirs.attention_scaling
    positions = torch.tensor([0, 1, 31, 4095, 131071])
    cos, sin = RotaryTable(ours.rope, ours.head_dim)(positions, torch.float32)
    their_cos, their_sin = theirs(torch.zeros(1), positions[None])
    assert torch.equal(cos, their_cos[0].chunk(2, -1)[0])
    assert torch.equal(sin, their_sin[0].chunk(2, -1)[0])


def test_old_and_new_rope_keys_mean_the_same() -> None:
    new = ModelConfig.from_hf(SIZES | {"model_type": "llama", "rope_parameters": LLAMA3})
    scaling = {k: v for k, v in LLAMA3.items() if k not in ("rope_theta", "rope_type")} | {"type": "llama3"}
    old = ModelConfig.from_hf(SIZES | {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": scaling})
    assert new.rope == old.rope
    outside = {k: v for k, v in YARN.items() if k != "original_max_position_embeddings"}
    keys = {"model_type": "llama", "original_max_position_embeddings": 32}
    assert ModelConfig.from_hf(SIZES | keys | {"rope_scaling": outside}).rope.original_max_position_embeddings == 32


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gpt_oss"}, "model_type: expected one of llama, mistral, qwen2, qwen3, got 'gpt_oss'"),
    ({"model_type": None}, "model_type: expected one of llama, mistral, qwen2, qwen3, got None"),
    ({"quantization_config": {"bits": 4}}, "quantization_config: quantized weights are not supported"),
    ({"num_local_experts": 8}, "num_local_experts: a mixture of experts is not supported, got 8"),
    ({"attention_sinks": True}, "attention_sinks: attention sinks are not supported"),
    ({"attention_dropout": 0.1}, "attention_dropout: dropout is not supported, got 0.1"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping: logit soft-capping is not supported"),
    ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
    ({"hidden_size": None}, "hidden_size: expected an integer from 1"),
    ({"vocab_size": 0}, "vocab_size: expected an integer from 1"),
    ({"num_hidden_layers": "2"}, "num_hidden_layers: expected an integer from 1 to 10000, got '2'"),
    ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of num_attention_heads=4, got 3"),
    ({"num_attention_heads": 5, "num_key_value_heads": 5}, "hidden_size: expected a multiple of num_attention_heads=5"),
    ({"head_dim": 15}, "head_dim: expected an even number, got 15"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false, got 'yes'"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a number from 0"),
    ({"pad_token_id": 96}, "pad_token_id: expected an id below vocab_size=96"),
    ({"sliding_window": 8}, "sliding_window: expected null with model_type 'llama', got 8"),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window: expected an integer from 1"),
    ({"model_type": "mistral", "attention_bias": True}, "attention_bias: expected False with model_type 'mistral'"),
    ({"model_type": "qwen3", "mlp_bias": True}, "mlp_bias: expected False with model_type 'qwen3'"),
    (
        {"model_type": "mistral", "layer_types": ["full_attention", "sliding_attention"]},
        "layer_types: expected absent, or 'sliding_attention' for each of 2 layers",
    ),
    (
        {"model_type": "qwen2", "layer_types": ["chunked_attention"] * 2},
        "layer_types: expected 2 of full_attention and sliding_attention",
    ),
    ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types: expected 2 of"),
    ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, "as use_sliding_window is off"),
    (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_scaling.rope_type: supported are default, linear, llama3, yarn; got 'dynamic'",
    ),
    ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type: supported are"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters.full_attention: unknown key"),
    ({"rope_parameters": [1]}, "rope_parameters: expected an object"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: expected a positive number, got None"),
    ({"rope_scaling": {"type": "linear", "factor": -1}}, "rope_scaling.factor: expected a positive number, got -1"),
    ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor: expected above low_freq_factor=1.0"),
    ({"rope_theta": 0}, "rope_theta: expected a number above 1, got 0"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: only 1.0 is supported, got 0.5"),
    ({"rope_scaling": YARN, "original_max_position_embeddings": "x"}, "original_max_position_embeddings: expected a"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED, ids=[m.split(":")[0] for _, m in REFUSED])
def test_refusals_name_the_key_and_what_is_supported(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^some/config\.json: .*{re.escape(message)}"):
        ModelConfig.from_hf(SIZES | {"model_type": "llama"} | keys, "some/config.json")


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "mistral"])
def test_key_value_heads_must_be_given_where_transformers_would_guess_a_size(model_type: str) -> None:
    keys = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"} | {"model_type": model_type}
    with pytest.raises(ValueError, match="num_key_value_heads: expected an integer"):
        ModelConfig.from_hf(keys)
    assert ModelConfig.from_hf(keys | {"num_key_value_heads": None}).num_key_value_heads == 4
    assert ModelConfig.from_hf(keys | {"model_type": "llama"}).num_key_value_heads == 4


def test_file_round_trip_keeps_every_byte_and_unknown_keys(tmp_path: Path) -> None:
    text = json.dumps(TINY | {"model_type": "llama", "torch_dtype": "bfloat16", "ünknown": [1, {"a": None}]}, indent=7)
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    config = ModelConfig.from_file(path)
    assert config.to_json() == text
    assert config.to_hf() == json.loads(text)
    assert config.with_dtype("bfloat16").to_json() == text
    changed = config.with_dtype("float32")
    assert json.loads(changed.to_json()) == json.loads(text) | {"torch_dtype": "float32"}
    assert list(changed.to_hf()) == list(json.loads(text))
    assert config.to_hf()["torch_dtype"] == "bfloat16"
    assert ModelConfig.from_hf(config.to_hf()) == config
    assert hash(config) == hash(ModelConfig.from_hf(config.to_hf()))


def test_a_configuration_without_dtype_gets_none() -> None:
    config = ModelConfig.from_hf(SIZES | {"model_type": "llama"})
    assert config.with_dtype("bfloat16") is config


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"null"])
def test_broken_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(ValueError, match=r"config.json: cannot read"):
        ModelConfig.from_file(path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"config.json: (not valid JSON|expected a JSON object)"):
        ModelConfig.from_file(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
READ_KEYS = [
    *SIZES, "model_type", "head_dim", "hidden_act", "rope_theta", "rope_scaling", "rope_parameters", "sliding_window",
    "layer_types", "use_sliding_window", "max_window_layers", "rms_norm_eps", "pad_token_id", "attention_bias",
    "max_position_embeddings", "original_max_position_embeddings", "initializer_range", "quantization_config",
]  # fmt: skip


@settings(derandomize=True, deadline=None)
@given(
    base=st.sampled_from(list(PUBLISHED.values())),
    changes=st.dictionaries(st.sampled_from(READ_KEYS), JSON, min_size=1, max_size=3),
    rope=st.dictionaries(st.sampled_from([*LLAMA3, *YARN, "type", "truncate"]), JSON | st.just("yarn"), max_size=4),
)
def test_any_value_is_read_or_refused(base: dict[str, Any], changes: dict[str, Any], rope: dict[str, Any]) -> None:
    for keys in (SIZES | base | changes, SIZES | base | changes | {"rope_scaling": rope}):
        try:
            config = ModelConfig.from_hf(keys)
        except ValueError:
            continue
        if config.head_dim < 10_000:
            assert inverse_frequencies(config.rope, config.head_dim).isfinite().all()


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_key_that_is_read_is_known(model_type: str) -> None:
    class Recording(dict[str, Any]):
        def __contains__(self, key: object) -> bool:
            read.add(str(key))
            return super().__contains__(key)

        def __getitem__(self, key: str) -> Any:
            read.add(key)
            return super().__getitem__(key)

        def get(self, key: str, default: Any = None) -> Any:
            read.add(key)
            return super().get(key, default)

    read: set[str] = set()
    scaling = {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}
    ModelConfig.from_hf(Recording({"model_type": model_type} | SIZES | scaling))
    assert len(read) > 25
    assert read <= KNOWN_KEYS
