"""Means of models and restored layers, against torch on the loaded tensors; refusals name the first difference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_table import CASES, TINY
from safetensors.torch import load_file
from weights_cases import LLAMA, edited, files_of

from fastsft.models import merge
from fastsft.models.merge import open_members, parse_layers, restore_layers, soup
from fastsft.models.tokenizer import Tokenizer
from fastsft.models.weights import init_model, load_model, save_model

TIED = TINY | {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 32}


def folders(
    root: Path, count: int, keys: dict[str, Any] = LLAMA, *, dtype: torch.dtype = torch.float32, shard: int = 10**9
) -> list[Path]:
    made = []
    for i in range(count):
        save_model(init_model(keys, seed=i, dtype=dtype), root / f"m{i}", max_shard_bytes=shard)
        made.append(root / f"m{i}")
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("piece", [1 << 22, 1000])
def test_a_soup_is_the_mean(dtype: torch.dtype, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "_PIECE", piece)
    members = folders(tmp_path, 3, dtype=dtype)
    soup(members, tmp_path / "soup")
    stored = [load_file(m / "model.safetensors") for m in members]
    got = load_file(tmp_path / "soup" / "model.safetensors")
    assert got.keys() == stored[0].keys()
    for name, tensor in got.items():
        expected = torch.stack([s[name].double() for s in stored]).mean(0).to(dtype)
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected), name


def test_a_soup_of_equal_models_is_that_model(tmp_path: Path) -> None:
    """Bit for bit and file for file, also in float32, where the sum of three is rounded."""
    (one,) = folders(tmp_path, 1)
    Tokenizer.train(["a b"], 300).save(one)
    soup([one, one, one], tmp_path / "soup")
    made = files_of(tmp_path / "soup")
    assert json.loads(made.pop("merge.json")) == {"soup": "uniform", "models": [str(one)] * 3}
    assert made == files_of(one)


def test_layouts_and_types_may_differ(tmp_path: Path) -> None:
    """Shards in the first, one file in the second, another type in the third: the first's layout comes out."""
    (first,) = folders(tmp_path / "a", 1, shard=100_000)
    (second,) = folders(tmp_path / "b", 1)
    (third,) = folders(tmp_path / "c", 1, dtype=torch.bfloat16)
    soup([first, second, third], tmp_path / "soup")
    assert {p.name for p in first.iterdir()} | {"merge.json"} == {p.name for p in (tmp_path / "soup").iterdir()}
    ours = load_model(tmp_path / "soup").state_dict()
    members = [load_model(m, dtype=torch.float64).state_dict() for m in (first, second, third)]
    for name, tensor in ours.items():
        assert torch.equal(tensor, ((members[0][name] + members[1][name] + members[2][name]) / 3).float()), name


def test_tensors_may_lie_in_any_order(tmp_path: Path) -> None:
    """The file of another writer: the last tensor by name comes first."""
    a, b = folders(tmp_path, 2)
    found = load_file(a / "model.safetensors")
    tensors = {name: found[name].clone() for name in sorted(found, reverse=True)}  # not the file, which is overwritten
    entries, data = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.numpy().tobytes()
        entries[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    header = json.dumps({name: entries[name] for name in sorted(entries)}).encode()
    header += b" " * (-len(header) % 8)
    (a / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    soup([a, b], tmp_path / "soup")
    other = load_file(b / "model.safetensors")
    for name, tensor in load_file(tmp_path / "soup" / "model.safetensors").items():
        assert torch.equal(tensor, ((tensors[name].double() + other[name].double()) / 2).float()), name


def test_a_tied_head_may_stand_for_the_embedding(tmp_path: Path) -> None:
    a, b = folders(tmp_path, 2, TIED)
    before = load_model(b).embed_tokens.weight.clone()
    edited(b, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    soup([a, b], tmp_path / "soup")
    expected = (load_model(a).embed_tokens.weight.double() + before.double()) / 2
    assert torch.equal(load_model(tmp_path / "soup").embed_tokens.weight, expected.float())


def test_a_head_that_differs_from_its_embedding_is_refused(tmp_path: Path) -> None:
    """As when such a folder is loaded: the mean would hold a head that nothing reads."""
    a, b = folders(tmp_path, 2, TIED)
    edited(b, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    for make in (lambda: soup([a, b], tmp_path / "out"), lambda: restore_layers(a, b, [0], tmp_path / "out")):
        with pytest.raises(ValueError, match=rf"{b}/model.safetensors: lm_head.weight differs from .* ties them"):
            make()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["llama untied GQA", "qwen3 tied GQA"])
def test_restored_layers_are_the_bases(case: str, tmp_path: Path) -> None:
    tuned, base = folders(tmp_path, 2, CASES[case])
    restore_layers(tuned, base, [0, 2], tmp_path / "out")
    ours, new, old = (load_file(f / "model.safetensors") for f in (tmp_path / "out", tuned, base))
    for name, tensor in ours.items():
        restored = name.startswith(("model.layers.0.", "model.layers.2."))
        assert torch.equal(tensor, (old if restored else new)[name]), name
    assert not torch.equal(new["model.layers.0.mlp.up_proj.weight"], old["model.layers.0.mlp.up_proj.weight"])


def test_all_layers_restored_of_a_model_in_another_type(tmp_path: Path) -> None:
    (tuned,) = folders(tmp_path / "a", 1, dtype=torch.bfloat16)
    (base,) = folders(tmp_path / "b", 1, dtype=torch.float32)
    restore_layers(tuned, base, range(3), tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in got.values()} == {torch.bfloat16}


@pytest.mark.parametrize(("text", "layers"), [("0", [0]), ("0-3,7", [0, 1, 2, 3, 7]), ("7, 2-2 ,7", [2, 7])])
def test_layers_are_parsed(text: str, layers: list[int]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "3-1", "-1", "1,,2", "a", "1-", "1.5", "0x1"])
def test_other_layers_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="layers: expected numbers and ranges"):
        parse_layers(text)


def test_refused_layers(tmp_path: Path) -> None:
    tuned, base = folders(tmp_path, 2)
    for layers in ([], [3], [0, -1]):
        with pytest.raises(ValueError, match="layers: expected numbers from 0 to 2"):
            restore_layers(tuned, base, layers, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refused_models(tmp_path: Path) -> None:
    a, b = folders(tmp_path, 2)
    (wide,) = folders(tmp_path / "wide", 1, LLAMA | {"intermediate_size": 96})
    (other,) = folders(tmp_path / "other", 1, TINY | {"model_type": "qwen2"})
    (theta,) = folders(tmp_path / "theta", 1, LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})
    for wrong, message in (
        ([a], "models: expected at least two folders, got 1"),
        ([a, b, wide], f"{wide} cannot be combined with {a}: config.json: intermediate_size: 96 against 88"),
        ([a, other], "config.json: model_type: 'qwen2' against 'llama'"),
        ([a, theta], "config.json: rope: "),
        ([a, tmp_path / "nowhere"], "nowhere: expected a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            soup(wrong, tmp_path / "soup")
    with pytest.raises(ValueError, match="expected the name of a new folder"):
        soup([a, b], b)
    edited(b, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"missing: model\.norm\.weight"):
        soup([a, b], tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


def test_refused_tokenizers(tmp_path: Path) -> None:
    a, b = folders(tmp_path, 2)
    Tokenizer.train(["the cat"], 263).save(a)
    with pytest.raises(ValueError, match=r"m1 cannot be combined with .*m0: one of them has no tokenizer\.json"):
        soup([a, b], tmp_path / "soup")
    Tokenizer.train(["the cat"], 263, ["<|x|>"]).save(b)
    with pytest.raises(ValueError, match=r"tokenizer\.json: token 3: '<\|x\|>' against "):
        soup([a, b], tmp_path / "soup")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(a / name, b / name)
    content = json.loads((b / "tokenizer.json").read_text())
    content["normalizer"] = None
    (b / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer\.json: normalizer differs"):
        soup([a, b], tmp_path / "soup")


def test_a_merge_that_dies_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = folders(tmp_path, 2)
    with open_members(members) as opened:
        monkeypatch.setattr(merge.os, "rename", lambda *a: (_ for _ in ()).throw(OSError("disk")))
        with pytest.raises(OSError, match="disk"):
            opened.write(tmp_path / "soup", lambda name: [0, 1], {})
    assert {p.name for p in tmp_path.iterdir()} == {"m0", "m1"}
