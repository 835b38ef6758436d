"""What may have changed when a run goes on; for the rest it says so and touches nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_resume import weights, write_texts
from resume_cases import small, train

from fastsft.config import ConfigError
from fastsft.models.weights import load_model, save_model


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("optim", "lr", 1e-3),
        ("optim", "beta2", 0.9),
        ("train", "accumulation", 1),
        ("train", "max_steps", 5),
        ("data", "max_bad", 0.5),
        (None, "seed", 1),
        ("model", "init", {"model_type": "llama"}),
    ],
)
def test_changed_setting_is_refused_by_name(
    section: str | None, key: str, value: Any, texts: Path, tmp_path: Path
) -> None:
    config = small(texts, tmp_path / "run")
    train(config)
    output = tmp_path / "run"
    kept = {p: p.read_bytes() for p in output.rglob("*") if p.is_file() and "data" not in p.parts}
    changed = json.loads(json.dumps(config))
    if section is None:
        changed[key] = value
    elif isinstance(value, dict):
        changed[section][key].update(value)
    else:
        changed[section][key] = value
    with pytest.raises(ConfigError, match=f"other settings: .*{key if section is None else f'{section}.{key}'}"):
        train(changed)
    for path, content in kept.items():
        assert path.read_bytes() == content, f"{path.name} was changed by a refused resume"


def test_a_checkpoint_from_before_a_key(texts: Path, tmp_path: Path) -> None:
    """Of an older version, which did not have the key: what it did is the default, and another value is a change."""
    config = small(texts, tmp_path / "run")
    train(config)
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        state = json.loads((folder / "trainer.json").read_text())
        del state["config"]["optim"]["ema"], state["config"]["lora"]
        rewrite_state(folder, state)
    assert train(config)[1].resumed_from == 4
    with pytest.raises(ConfigError, match=r"other settings: optim\.ema\."):
        train({**config, "optim": {**config["optim"], "ema": 0.9}})


def test_a_checkpoint_with_a_key_that_is_gone(texts: Path, tmp_path: Path) -> None:
    config = small(texts, tmp_path / "run")
    train(config)
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        state = json.loads((folder / "trainer.json").read_text())
        state["config"]["optim"]["gone"] = 1
        rewrite_state(folder, state)
    with pytest.raises(ConfigError, match=r"other settings: optim\.gone\."):
        train(config)


def rewrite_state(folder: Path, state: dict[str, Any]) -> None:
    """trainer.json and its checksum."""
    (folder / "trainer.json").write_text(json.dumps(state))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["trainer.json"] = hashlib.sha256((folder / "trainer.json").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_changed_data_is_refused(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "train.jsonl")
    config = small(texts, tmp_path / "run")
    train(config)
    write_texts(texts, seed=1)
    with pytest.raises(ConfigError, match="other settings: the data"):
        train(config)


def from_folder(texts: Path, tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """A run that starts from a model's folder, and the folder."""
    start = tmp_path / "start"
    _, first = train(small(texts, tmp_path / "first"))
    shutil.copytree(first.model_path, start)
    config = small(texts, tmp_path / "run")
    return {**config, "model": {"path": str(start), "dtype": "float32"}, "tokenizer": {}}, start


@pytest.mark.parametrize("change", ["weights", "config.json"])
def test_changed_start_is_refused(change: str, texts: Path, tmp_path: Path) -> None:
    config, start = from_folder(texts, tmp_path)
    train(config)
    if change == "weights":
        model = load_model(start)
        with torch.no_grad():
            model.embed_tokens.weight[3, 5] += 1e-3
        save_model(model, start)
    else:
        fields = json.loads((start / "config.json").read_text())
        (start / "config.json").write_text(json.dumps(fields | {"rope_theta": 5e5}))
    with pytest.raises(ConfigError, match=r"other settings: the model it started from \(weights or config\.json\)\."):
        train(config)


def test_the_same_start_in_other_files_is_not_refused(texts: Path, tmp_path: Path) -> None:
    config, start = from_folder(texts, tmp_path)
    train(config)
    save_model(load_model(start), start, max_shard_bytes=10_000)
    assert not (start / "model.safetensors").exists()
    assert train(config)[1].resumed_from == 4


def test_a_run_moved_with_its_data_goes_on(texts: Path, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    config, start = from_folder(texts, old)
    shutil.copy(texts, old / "texts.jsonl")
    config["data"] |= {"train": [str(old / "texts.jsonl")], "eval": [str(old / "texts.jsonl")]}
    config["data"].pop("eval_fraction", None)
    train(config)
    old.rename(new)
    moved = json.loads(json.dumps(config).replace(str(old), str(new)))
    assert moved["model"]["path"] == str(new / start.name)
    assert train(moved)[1].resumed_from == 4


def test_settings_without_effect_may_change(texts: Path, tmp_path: Path) -> None:
    config = small(texts, tmp_path / "run")
    _, first = train(config)
    bytes_before = weights(first.model_path)
    config["train"].update(eval_every=2, save_every=3, keep=1)
    _, second = train(config)
    assert second.resumed_from == 4
    assert weights(second.model_path) == bytes_before
    assert second.eval_before == first.eval_before
    assert second.eval_after == first.eval_after
