"""PEFT's folders: the real PEFT reads ours and we read its; what plain LoRA is not is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_cases import LLAMA, QWEN2, adapted
from parity_table import logits, pair
from safetensors.torch import load_file, save_file

from fastsft.models.adapter import CONFIG, WEIGHTS, load_adapter, save_adapter
from fastsft.models.decoder import Decoder
from fastsft.models.lora import LoraConfig, add_lora, lora_layers, merge_lora
from fastsft.models.weights import init_model, load_model, save_model

IDS = torch.arange(3, 60)
SMALL = LoraConfig(rank=4, alpha=6.0)


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft", reason="PEFT is part of the dev extra")


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("keys", [LLAMA, QWEN2], ids=["llama", "qwen2 tied"])
def test_peft_reads_ours(keys: dict[str, Any], stabilised: bool, peft: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    model = adapted(LoraConfig(rank=5, alpha=7.0, rank_stabilised=stabilised), keys)
    save_adapter(model, tmp_path / "adapter", base="some/base")
    expected = logits(model, [IDS]).detach()
    merge_lora(model)
    save_model(init_model(keys, seed=0), tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert theirs.peft_config["default"].base_model_name_or_path == "some/base"
    with torch.no_grad():
        assert close(theirs(IDS[None], use_cache=False).logits[0], expected)
    merged = dict(theirs.merge_and_unload().named_parameters())
    for name, parameter in model.named_parameters():
        want = merged[name if name.startswith("lm_head") else f"model.{name}"]
        assert (parameter - want).abs().max() <= 1e-6 * want.abs().max(), name


@pytest.mark.parametrize(
    "own",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "lora_dropout": 0.1},
        {"target_modules": ["model.layers.1.mlp.down_proj", "o_proj"], "init_lora_weights": "gaussian"},
        {"target_modules": ["up_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=lambda own: ", ".join(own),
)
def test_we_read_pefts(own: dict[str, Any], peft: Any, tmp_path: Path) -> None:
    theirs, ours = pair(LLAMA, tmp_path / "base")
    torch.manual_seed(3)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=3, lora_alpha=4, task_type="CAUSAL_LM", **own)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
        expected = theirs(IDS[None], use_cache=False).logits[0]
    theirs.save_pretrained(tmp_path / "adapter")
    before = logits(ours, [IDS]).detach()
    config = load_adapter(ours, tmp_path / "adapter")
    got = logits(ours, [IDS])
    assert (config.rank, config.alpha, config.rank_stabilised) == (3, 4.0, own.get("use_rslora", False))
    assert close(got, expected)
    assert not close(got, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_in_bits_onto_a_plain_and_an_adapted_model(dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted(SMALL, dtype=dtype)
    save_adapter(model, tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [CONFIG, WEIGHTS]
    plain = init_model(LLAMA, seed=0, dtype=dtype)
    same = init_model(LLAMA, seed=0, dtype=dtype)
    add_lora(same, SMALL, seed=11)
    for other in (plain, same):
        assert load_adapter(other, tmp_path / "adapter") == SMALL
        assert equal(other, model)
        assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in model.parameters()]
    save_adapter(plain, tmp_path / "adapter")  # over what is there
    assert equal(plain, model)
    different = init_model(LLAMA, seed=0)
    add_lora(different, LoraConfig(rank=5), seed=11)
    with pytest.raises(ValueError, match=r"expected the adapters that the model has, got LoraConfig\(rank=4, alpha=6"):
        load_adapter(different, tmp_path / "adapter")


def equal(a: Decoder, b: Decoder) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_a_model_without_adapters_has_none_to_save(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model: expected one with adapters, found none"):
        save_adapter(init_model(LLAMA, seed=0), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("use_dora", True, "what switches it off"),
        ("rank_pattern", {"q_proj": 2}, "what switches it off"),
        ("alpha_pattern", {"q_proj": 2}, "what switches it off"),
        ("layers_to_transform", [0], "what switches it off"),
        ("fan_in_fan_out", True, "what switches it off"),
        ("something_new", 1, "what switches it off"),
        ("init_lora_weights", "pissa", "one that leaves the base weights alone"),
        ("bias", "all", "'none'"),
        ("peft_type", "IA3", "'LORA'"),
        ("r", 0, "a positive integer"),
        ("r", True, "a positive integer"),
        ("r", None, "a positive integer"),
        ("lora_alpha", -1, "a positive number"),
        ("lora_alpha", float("inf"), "a positive number"),
        ("target_modules", ".*q_proj", "a list of module names"),
        ("target_modules", [], "a list of module names"),
        ("use_rslora", "yes", "true or false"),
    ],
)
def test_other_methods_are_refused_by_the_keys_name(key: str, value: Any, message: str, tmp_path: Path) -> None:
    save_adapter(adapted(SMALL), tmp_path)
    keys = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(keys | {key: value}))
    with pytest.raises(ValueError, match=rf"adapter_config.json: {key}: expected {message}.*, got "):
        refused(tmp_path)


def refused(folder: Path) -> None:
    """Load onto a model, which must come out as it went in."""
    model = init_model(LLAMA, seed=0)
    try:
        load_adapter(model, folder)
    finally:
        assert not list(lora_layers(model))
        assert all(p.requires_grad for p in model.parameters())


def test_every_tensor_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    save_adapter(adapted(SMALL), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    layer = "base_model.model.model.layers.1.mlp.up_proj"
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    tensors[f"{layer}.lora_A.weight"] = torch.zeros(2, 2)
    tensors[f"{layer}.lora_B.weight"] = torch.zeros(88, 4, dtype=torch.int8)
    tensors[f"{layer}.lora_magnitude_vector"] = torch.zeros(1)
    tensors["base_model.model.lm_head.weight"] = torch.zeros(113, 128)
    tensors["base_model.model.model.norm.weight"] = torch.ones(128)  # the base model's own
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="do not fit") as error:
        refused(tmp_path)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{tmp_path}: the tensors do not fit the model:"
    assert lines[1] == "  missing: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert sorted(lines[2:]) == [
        f"  shape: {layer}.lora_A.weight: expected [4, 128], got [2, 2]",
        f"  type: {layer}.lora_B.weight: expected floating point, got torch.int8",
        f"  unexpected: {layer}.lora_magnitude_vector",
        "  whole module: base_model.model.lm_head.weight: expected the base model's own values",
    ]


def test_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter_config.json: not readable JSON"):
        refused(tmp_path)
    save_adapter(adapted(SMALL), tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    for length in (0, 7, 100, len(whole) - 1):
        (tmp_path / WEIGHTS).write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"adapter_model.safetensors: not a readable safetensors file"):
            refused(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: not a readable safetensors file"):
        refused(tmp_path)
    (tmp_path / CONFIG).write_text("[]")
    with pytest.raises(ValueError, match=r"adapter_config.json: expected an object, got list"):
        refused(tmp_path)


def test_targets_outside_the_blocks_are_refused(tmp_path: Path) -> None:
    save_adapter(adapted(SMALL), tmp_path)
    keys = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(keys | {"target_modules": ["q_proj", "lm_head"]}))
    with pytest.raises(ValueError, match=r"targets: expected names of linear layers of the blocks .*, got 'lm_head'"):
        refused(tmp_path)


def test_an_adapter_of_another_size_is_refused(tmp_path: Path) -> None:
    save_adapter(adapted(SMALL, LLAMA | {"intermediate_size": 96}), tmp_path / "adapter")
    save_model(init_model(LLAMA, seed=0), tmp_path / "base")
    with pytest.raises(ValueError, match=r"mlp.down_proj.lora_A.weight: expected \[4, 88\], got \[4, 96\]"):
        load_adapter(load_model(tmp_path / "base"), tmp_path / "adapter")
