"""Folders that do not fit their config.json, or that are damaged: refused, with every reason."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from parity_table import TINY, pair
from safetensors.torch import save_file
from weights_cases import LLAMA, edited

from fastsft.models.weights import load_model


def test_every_tensor_that_does_not_fit_is_listed_with_its_file(tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"], tensors["lm_head.weight"]
        tensors["model.layers.0.mlp.gate_proj.weight"] = torch.zeros(3, 4)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(128)
        tensors["model.layers.1.input_layernorm.weight"] = torch.zeros(128, dtype=torch.int8)

    pair(LLAMA, tmp_path)
    edited(tmp_path, edit)
    with pytest.raises(ValueError, match="do not fit") as error:
        load_model(tmp_path)
    assert str(error.value).splitlines() == [
        f"{tmp_path}: the tensors do not fit config.json:",
        "  missing: model.norm.weight",
        "  missing: lm_head.weight",
        "  shape: model.layers.0.mlp.gate_proj.weight in model.safetensors: expected [88, 128], got [3, 4]",
        "  unexpected: model.layers.0.self_attn.q_proj.bias in model.safetensors",
        "  type: model.layers.1.input_layernorm.weight in model.safetensors: expected floating point, got I8",
    ]


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    pair(LLAMA, tmp_path)
    save_file({"model.norm.weight": torch.ones(128)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"\n  \.\.\. and 9 more$"):
        load_model(tmp_path)


def test_missing_folders_and_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: expected a folder with config.json"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"config.json: cannot read"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(ValueError, match=r"found neither model.safetensors nor model.safetensors.index.json"):
        load_model(tmp_path)


def test_truncated_files_are_refused_at_every_length(tmp_path: Path) -> None:
    pair(TINY | {"model_type": "llama", "num_hidden_layers": 1}, tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for length in [*range(0, header, 97), header, header + 1, len(content) // 2, len(content) - 1]:
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"model.safetensors: not a readable safetensors file"):
            load_model(tmp_path)


def test_flipped_header_bits_are_read_or_refused(tmp_path: Path) -> None:
    pair(TINY | {"model_type": "llama", "num_hidden_layers": 1}, tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for position in range(0, header, 5):
        broken = bytearray(content)
        broken[position] ^= 1 << (position % 8)
        file.write_bytes(broken)
        with contextlib.suppress(ValueError):  # and nothing else; a flip in the metadata may go unnoticed
            load_model(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not a safetensors index"),
        ("[]", "not a safetensors index"),
        ("{}", "not a safetensors index"),
        ('{"weight_map": []}', "weight_map: expected tensor names mapped to file names"),
        ('{"weight_map": {"a": 1}}', "weight_map: expected tensor names mapped to file names"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "weight_map: expected tensor names mapped to file names"),
        ('{"weight_map": {"a": "absent.safetensors"}}', "absent.safetensors: not a readable safetensors file"),
        ('{"weight_map": {"a": "part.safetensors"}}', "places a in part.safetensors, which does not hold it"),
    ],
)
def test_broken_indexes(index: str, message: str, tmp_path: Path) -> None:
    pair(LLAMA, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)
