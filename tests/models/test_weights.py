"""Model folders: byte-exact round trips, sharding, refusals, and saves that are whole or absent."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_table import CASES, TINY, logits, pair, reference
from safetensors.torch import load_file, save_file

from fastsft.models import weights
from fastsft.models.decoder import Decoder
from fastsft.models.weights import init_model, load_model, save_model

LLAMA = TINY | {"model_type": "llama"}
COMPANIONS = {
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b"{ }\r\n",
    "chat_template.jinja": "{{ 'ä' }}".encode(),
    "generation_config.json": b'{\n  "eos_token_id": [1, 2]\n}',
    "special_tokens_map.json": b"{}",
    "merges.txt": b"#version: 0.2\n",
}
ONE_PER_FAMILY = ["llama tied GQA", "qwen2 tied GQA", "qwen3 untied GQA", "mistral window 7"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def equal_weights(a: Decoder, b: Decoder) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[n], theirs[n]) for n in ours)


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
    from transformers import AutoModelForCausalLM

    model = init_model(CASES[name], seed=1)
    save_model(model, tmp_path / "m", max_shard_bytes=shard)
    theirs, report = AutoModelForCausalLM.from_pretrained(
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
    from transformers import AutoModelForCausalLM

    sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    keys = {k: TINY[k] for k in [*sizes, "num_key_value_heads"]} | {"model_type": model_type}
    model = init_model(keys, seed=1)
    save_model(model, tmp_path / "m")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="eager")
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


# --- tied heads and old checkpoints ---------------------------------------------------------------------------------


def edited(folder: Path, edit: Any) -> None:
    """Apply ``edit`` to the tensors of a single-file folder."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


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


# --- folders that do not fit ----------------------------------------------------------------------------------------


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


# --- saving ---------------------------------------------------------------------------------------------------------


def test_saving_over_an_earlier_save_leaves_no_stale_weights(tmp_path: Path) -> None:
    first, second = init_model(LLAMA, seed=0), init_model(LLAMA, seed=1)
    save_model(first, tmp_path, max_shard_bytes=100_000)
    (tmp_path / "optimizer.bin").write_bytes(b"kept")
    save_model(second, tmp_path)
    assert set(files_of(tmp_path)) == {"config.json", "model.safetensors", "optimizer.bin"}
    assert equal_weights(load_model(tmp_path), second)
    save_model(first, tmp_path, max_shard_bytes=100_000)
    assert not (tmp_path / "model.safetensors").exists()
    assert equal_weights(load_model(tmp_path), first)


class Crash(Exception):
    pass


def crash_at(patch: pytest.MonkeyPatch, fatal: int) -> None:
    """Let the ``fatal``-th call among fsync, replace and rename raise."""
    calls = itertools.count()

    def failing(real: Any) -> Any:
        def call(*args: Any) -> Any:
            if next(calls) == fatal:
                raise Crash
            return real(*args)

        return call

    for name in ("fsync", "replace", "rename"):
        patch.setattr(weights.os, name, failing(getattr(os, name)))


@pytest.mark.parametrize("exists", [False, True])
def test_a_save_that_dies_anywhere_leaves_whole_files_and_no_stage(
    exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fail the n-th system call that makes the save durable, for every n until one save succeeds."""
    old, new = init_model(LLAMA, seed=0), init_model(LLAMA, seed=1)
    save_model(old, tmp_path / "old", max_shard_bytes=400_000)
    save_model(new, tmp_path / "new", max_shard_bytes=400_000)
    whole = {name: {files_of(tmp_path / f)[name] for f in ("old", "new")} for name in files_of(tmp_path / "new")}

    for fatal in itertools.count():
        home = tmp_path / f"home-{fatal}"
        home.mkdir()
        target = home / "m"
        if exists:
            shutil.copytree(tmp_path / "old", target)
        with monkeypatch.context() as patch:
            crash_at(patch, fatal)
            try:
                save_model(new, target, max_shard_bytes=400_000)
                survived = True
            except Crash:
                survived = False
        assert [p.name for p in home.iterdir()] in ([], ["m"])
        if target.exists():
            found = files_of(target)
            assert found.keys() == whole.keys()
            assert all(content in whole[name] for name, content in found.items())
            assert exists or found == files_of(tmp_path / "new")
        if survived:
            break
    assert fatal > 5
    assert equal_weights(load_model(target), new)


def test_everything_is_on_disk_before_the_folder_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    rename = os.rename
    monkeypatch.setattr(weights, "sync", lambda path: events.append(path.name))
    monkeypatch.setattr(weights.os, "rename", lambda a, b: (events.append(f"rename to {b.name}"), rename(a, b)))
    save_model(init_model(LLAMA, seed=0), tmp_path / "m")
    stage = f".m-{os.getpid()}.tmp"
    assert events == ["model.safetensors", "config.json", stage, "rename to m", tmp_path.name]


def test_bad_save_arguments(tmp_path: Path) -> None:
    model = init_model(LLAMA, seed=0)
    with pytest.raises(ValueError, match="files_from: expected a folder, got"):
        save_model(model, tmp_path / "m", files_from=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="max_shard_bytes: expected a positive number, got 0"):
        save_model(model, tmp_path / "m", max_shard_bytes=0)
    assert not (tmp_path / "m").exists()


# --- initialisation -------------------------------------------------------------------------------------------------


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
