"""A model folder in the forms that the rivals of ``bench_engine.py`` read: GGUF, OpenVINO, CTranslate2. Each function
runs where its rival is installed, writes beside the folder once and returns the path."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

GROUP = 32  # int4: weights that share a scale


def _once(path: Path, write: Callable[[Path], Any]) -> Path:
    """Whole or not at all: another process may be killed while it writes."""
    if not path.exists():
        partial = path.with_name(f"{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        write(partial)
        partial.rename(path)
    return path


def gguf(folder: Path, format: str) -> Path:
    """float32, bfloat16, q8_0 or q4_0 in every matrix, embedding and head included, as our formats have it."""

    def write(path: Path) -> None:
        import numpy as np
        from gguf import GGMLQuantizationType, GGUFWriter, quants
        from safetensors.numpy import load_file

        kinds = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
        kind = GGMLQuantizationType[kinds[format]]
        config = json.loads((folder / "config.json").read_text())
        out = GGUFWriter(path, "qwen2")
        out.add_context_length(config["max_position_embeddings"])
        out.add_embedding_length(config["hidden_size"])
        out.add_block_count(config["num_hidden_layers"])
        out.add_feed_forward_length(config["intermediate_size"])
        out.add_head_count(config["num_attention_heads"])
        out.add_head_count_kv(config["num_key_value_heads"])
        out.add_layer_norm_rms_eps(config["rms_norm_eps"])
        out.add_rope_freq_base(config["rope_theta"])
        out.add_vocab_size(config["vocab_size"])
        out.add_tokenizer_model("no_vocab")
        for name, values in load_file(folder / "model.safetensors").items():
            if values.ndim == 1:
                out.add_tensor(_gguf_name(name), values.astype(np.float32))
            else:
                out.add_tensor(_gguf_name(name), quants.quantize(values, kind), raw_dtype=kind)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()

    return _once(folder.with_name(f"{format}.gguf"), write)


GGUF_NAMES = {
    "embed_tokens": "token_embd", "norm": "output_norm", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def _gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight is blk.3.ffn_up.weight."""
    module, _, kind = name.removeprefix("model.").rpartition(".")
    if not module.startswith("layers."):
        return f"{GGUF_NAMES[module]}.{kind}"
    _, layer, module = module.split(".", 2)
    return f"blk.{layer}.{GGUF_NAMES[module]}.{kind}"


def openvino(folder: Path, format: str) -> Path:
    """float32 (also for bfloat16, which is how it computes then), symmetric int8 per channel, or int4 in groups."""

    def write(path: Path) -> None:
        from openvino import save_model
        from openvino_tokenizers import convert_tokenizer
        from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
        from transformers import AutoTokenizer

        quantised: dict[str, Any] = {}
        if format == "int8":
            quantised["quantization_config"] = OVWeightQuantizationConfig(bits=8, sym=True)
        elif format == "int4":
            config = OVWeightQuantizationConfig(bits=4, sym=True, group_size=GROUP, ratio=1.0, all_layers=True)
            quantised["quantization_config"] = config
        else:
            quantised["load_in_8bit"] = False
        OVModelForCausalLM.from_pretrained(folder, export=True, compile=False, **quantised).save_pretrained(path)
        parts = convert_tokenizer(AutoTokenizer.from_pretrained(folder), with_detokenizer=True)
        for name, part in zip(("tokenizer", "detokenizer"), parts, strict=True):
            save_model(part, path / f"openvino_{name}.xml")

    stored = "float32" if format == "bfloat16" else format
    return _once(folder.with_name(f"openvino-{stored}"), write)


def ctranslate2(folder: Path, format: str) -> Path:
    """float32, bfloat16, or int8 per channel."""

    def write(path: Path) -> None:
        from ctranslate2.converters import TransformersConverter

        TransformersConverter(str(folder)).convert(str(path), quantization=format)
        names = json.loads((path / "vocabulary.json").read_text())
        config = json.loads((path / "config.json").read_text())
        config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), names[0])  # it insists on all three
        (path / "config.json").write_text(json.dumps(config))

    return _once(folder.with_name(f"ctranslate2-{format}"), write)
