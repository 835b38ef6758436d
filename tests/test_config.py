"""Run configurations: what is read, and how every mistake is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastsft.config import (
    FIELD_NAMES,
    Config,
    ConfigError,
    DataOptions,
    TrainOptions,
    load_config,
    to_dict,
    to_json,
)
from fastsft.config.load import _leaves
from fastsft.data.records import FIELDS


def test_defaults_and_round_trip(tmp_path: Path) -> None:
    assert load_config({}) == Config()
    config = load_config({"seed": 3, "data": {"train": ["a.jsonl"], "dedup": {"mode": "near"}}, "optim": {"lr": 1}})
    assert load_config(to_dict(config)) == config
    assert load_config(json.loads(to_json(config))) == config
    path = tmp_path / "run.toml"
    path.write_text('seed = 3\n[data]\ntrain = ["a.jsonl"]\ndedup.mode = "near"\n[optim]\nlr = 1\n')
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"sed": 1}, "unknown key 'sed'; did you mean 'seed'"),
        ({"stages": [{"name": "a", "lr": "3e-3"}]}, r"stages\.0\.lr: expected a number, got '3e-3'"),
        ({"stages": [{"name": "a", "lr": float("inf")}]}, r"stages\.0\.lr: expected a finite number, got inf"),
        ({"stages": [{"name": "a"}, {"name": "b", "epochs": True}]}, r"stages\.1\.epochs: expected a number, got True"),
        ({"stages": [{"name": "a", "ratios": {"x": float("inf")}}]}, r"stages\.0\.ratios\.x: expected a finite number"),
        (
            {"data": {"sources": [{"name": "a", "files": ["f"], "cap": "5"}]}},
            r"data\.sources\.0\.cap: expected a number",
        ),
        ({"train": {"epoch": 1}}, "unknown key 'train.epoch'; did you mean 'epochs'"),
        ({"data": {"fim": {"zzz": 1}}}, "unknown key 'data.fim.zzz'; known keys: rate, spm_rate, format"),
        ({"optim": {"lr": "fast"}}, "optim.lr: .* got 'fast'"),
        ({"optim": {"lr": "3e-3"}}, "optim.lr: expected a number, got '3e-3'"),
        ({"train": {"epochs": True}}, "train.epochs: expected a number, got True"),
        ({"train": {"activation_checkpointing": "yes"}}, "activation_checkpointing: expected true or false, got 'yes'"),
        ({"train": {"activation_checkpointing": 1}}, "activation_checkpointing: expected true or false, got 1"),
        ({"data": {"fields": {"promt": "q"}}}, "unknown key 'data.fields.promt'; did you mean 'prompt'"),
        ({"data": {"fields": {"x": "q"}}}, "unknown key 'data.fields.x'; known keys: messages, prompt"),
        ({"model": {"dtype": "float16"}}, "model.dtype: .* got 'float16'"),
        ({"model": {"path": "x", "init": {"a": 1}}}, "model: give either path or init"),
        ({"model": {"path": "x"}, "tokenizer": {"train_vocab": 300}}, "tokenizer.train_vocab: a model read from"),
        ({"data": {"max_length": 9000}}, "train.tokens_per_batch: expected at least data.max_length = 9000, got 8192"),
    ],
)
def test_mistakes_are_named(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(raw)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1), ("seed", 2**63), ("data.eval_fraction", 1.0), ("data.max_length", 1), ("data.weights.prompt", -1),
        ("data.max_bad", 1.1), ("data.dedup.threshold", 0.0),
        ("data.fim.rate", 1.1), ("data.fim.spm_rate", -0.1), ("optim.lr", 0.0),
        ("optim.lr", float("nan")), ("optim.beta1", 1.0), ("optim.eps", 0.0), ("optim.weight_decay", -1),
        ("optim.clip_norm", -1), ("schedule.warmup", -1), ("schedule.final", 2), ("train.accumulation", 0),
        ("train.epochs", 0), ("train.keep", 0), ("train.max_steps", 0), ("train.save_every", -1),
    ],
)  # fmt: skip
def test_values_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"config: {name}: expected .*, got "):
        load_config(_with({}, name, value))


def _with(raw: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    *sections, key = name.split(".")
    node = raw
    for section in sections:
        node = node.setdefault(section, {})
    node[key] = value
    return raw


def test_every_number_is_finite() -> None:
    names = [name for name, value in _leaves(to_dict(Config())) if isinstance(value, float)]
    assert {"optim.lr", "optim.eps", "optim.weight_decay", "data.weights.prompt", "data.dedup.threshold"} <= {*names}
    for name in names:
        for value in (float("inf"), float("-inf"), float("nan")):
            with pytest.raises(ConfigError, match=f"config: {name}: expected a finite number, got "):
                load_config(_with({}, name, value))
    with pytest.raises(ConfigError, match=r"model\.init\.rope_theta: expected a finite number"):
        load_config({"model": {"init": {"rope_theta": float("inf")}}})


def test_a_config_object_is_validated() -> None:
    assert load_config(Config(seed=3)) == Config(seed=3)
    with pytest.raises(ConfigError, match=r"train\.epochs: expected at least 1, got 0"):
        load_config(Config(train=TrainOptions(epochs=0)))
    with pytest.raises(ConfigError, match=r"data\.on_long: .* got 'skipp'"):
        load_config(Config(data=DataOptions(on_long="skipp")))  # type: ignore[arg-type]


def test_paths_of_pathlib() -> None:
    config = load_config({"output": Path("a"), "model": {"path": Path("b")}, "data": {"train": [Path("c"), "d"]}})
    assert (config.output, config.model.path, config.data.train) == ("a", "b", ["c", "d"])


def test_field_names_are_those_of_rows() -> None:
    assert {*FIELD_NAMES} == {name for names in FIELDS.values() for name in names} | {"weight", "skills"}


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot read: No such file"):
        load_config(tmp_path / "none.toml")
    for name, content in (("a.toml", b"seed = "), ("b.toml", b"seed = '\xff'")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=f"{name}: not valid TOML"):
            load_config(tmp_path / name)
