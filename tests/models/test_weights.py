"""Model folders: byte-exact round trips, sharding, tied heads; and the weights a new model begins with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from parity_table import CASES, TINY, logits, pair, reference
from safetensors.torch import load_file, save_file
from weights_cases import LLAMA, edited, equal_weights, files_of

from fastsft.models.weights import init_model, load_model, save_model

COMPANIONS = {
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b"{ }\r\n",
    "chat_template.jinja": "{{ 'ä' }}".encode(),
    "generation_config.json": b'{\n  "eos_token_id": [1, 2]\n}',
    "special_tokens_map.json": b"{}",
    "merges.txt": b"#version: 0.2\n",
}
ONE_PER_FAMILY = ["llama tied GQA", "qwen2 tied GQA", "qwen3 untied GQA", "mistral window 7"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_a_transformers_folder_comes_back_byte_for_byte(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    reference(CASES[name]).to(dtype).save_pretrained(source)
    for file, content in COMPANIONS.items():
        (source / file).write_bytes(content)
    (source / "README.md").write_text("about the old weights")
    save_model(load_model(source, dtype=dtype), copy, files_from=source)
    expected = files_of(source)
    del expected["README.md"]
    assert files_of(copy) == expected


def test_shards_equal_transformers_shards(tmp_path: Path) -> None:
    theirs = reference(CASES["qwen2 untied GQA"])
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    model = load_model(tmp_path / "theirs")
    save_model(model, tmp_path / "ours", max_shard_bytes=100_000, files_from=tmp_path / "theirs")
    assert files_of(tmp_path / "ours") == files_of(tmp_path / "theirs")
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 3
    assert equal_weights(load_model(tmp_path / "ours"), model)


def test_a_tensor_above_the_shard_size_has_a_shard_to_itself(tmp_path: Path) -> None:
    model = init_model(LLAMA, seed=0)
    save_model(model, tmp_path / "m", max_shard_bytes=1)
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) == len(list(model.parameters()))
    assert equal_weights(load_model(tmp_path / "m"), model)


def test_the_shard_limit_is_inclusive(tmp_path: Path) -> None:
    model = init_model(LLAMA, seed=0)
    size = sum(p.nbytes for p in model.parameters())
    save_model(model, tmp_path / "one", max_shard_bytes=size)
    save_model(model, tmp_path / "two", max_shard_bytes=size - 1)
    assert {p.name for p in (tmp_path / "one").glob("*.safetensors")} == {"model.safetensors"}
    assert len(list((tmp_path / "two").glob("*.safetensors"))) == 2


@pytest.mark.parametrize("shard", [10**9, 100_000])
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_transformers_reads_what_we_save(name: str, shard: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    model = init_model(CASES[name], seed=1)
    save_model(model, tmp_path / "m", max_shard_bytes=shard)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    ids = torch.arange(50) % 113
    with torch.no_grad():
        expected = theirs(ids[None], use_cache=False).logits[0]
        got = logits(model, [ids])
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
def test_transformers_fills_absent_keys_as_we_do(model_type: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    keys = {k: TINY[k] for k in [*sizes, "num_key_value_heads"]} | {"model_type": model_type}
    model = init_model(keys, seed=1)
    save_model(model, tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="eager")
    assert type(theirs).__name__ == model.config.architecture == theirs.config.architectures[0]
    ids = torch.arange(50)
    with torch.no_grad():
        expected = theirs(ids[None], use_cache=False).logits[0]
        assert (logits(model, [ids]) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_loading_converts_and_saving_declares_the_stored_type(tmp_path: Path) -> None:
    source = tmp_path / "source"
    reference(LLAMA).to(torch.bfloat16).save_pretrained(source)
    wide = load_model(source)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert torch.equal(wide.to(torch.bfloat16).norm.weight, load_model(source, dtype=torch.bfloat16).norm.weight)

    save_model(load_model(source), tmp_path / "wide")
    assert json.loads((tmp_path / "wide" / "config.json").read_bytes())["dtype"] == "float32"
    assert {t.dtype for t in load_file(tmp_path / "wide" / "model.safetensors").values()} == {torch.float32}
    double = {n: t.double() for n, t in load_file(source / "model.safetensors").items()}
    save_file(double, source / "model.safetensors")
    assert equal_weights(load_model(source), load_model(tmp_path / "wide"))


def test_tied_head_may_be_stored_too_or_instead(tmp_path: Path) -> None:
    pair(CASES["llama tied GQA"], tmp_path)
    model = load_model(tmp_path)
    assert model.lm_head_weight is model.embed_tokens.weight

    edited(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert equal_weights(load_model(tmp_path), model)
    edited(tmp_path, lambda t: t.pop("model.embed_tokens.weight"))
    assert equal_weights(load_model(tmp_path), model)


def test_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    pair(CASES["llama tied GQA"], tmp_path)
    edited(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ValueError, match=r"model.safetensors: lm_head.weight differs from model.embed_tokens.weight"):
        load_model(tmp_path)


def test_rotary_buffers_of_old_checkpoints_are_passed_over(tmp_path: Path) -> None:
    _, model = pair(LLAMA, tmp_path)
    edited(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    assert equal_weights(load_model(tmp_path), model)


def test_initialisation_is_transformers_distribution_and_a_function_of_the_seed() -> None:
    keys = LLAMA | {"attention_bias": True, "initializer_range": 0.05, "pad_token_id": 3, "hidden_size": 256}
    model = init_model(keys, seed=7)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.endswith("bias"):
            assert torch.equal(parameter, torch.zeros_like(parameter)), name
        else:
            parameter = parameter.detach()
            rows = parameter[torch.arange(len(parameter)) != 3] if name == "embed_tokens.weight" else parameter
            deviation = 0.05 / rows.numel() ** 0.5
            assert abs(float(rows.mean())) < 5 * deviation, name
            assert abs(float(rows.std()) - 0.05) < 5 * deviation, name
    assert torch.equal(model.embed_tokens.weight[3], torch.zeros(256))
    assert equal_weights(model, init_model(keys, seed=7))
    assert not equal_weights(model, init_model(keys, seed=8))
    assert equal_weights(model.to(torch.bfloat16), init_model(keys, seed=7, dtype=torch.bfloat16))
    global_state = torch.get_rng_state()
    init_model(keys, seed=7)
    assert torch.equal(global_state, torch.get_rng_state())
