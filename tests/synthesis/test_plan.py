"""A plan's file: every key is checked, and what a round sets itself is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastsft.config import ConfigError
from fastsft.synthesis.plan import load_plan

LEAST: dict[str, Any] = {"output": "out", "model": "m", "tasks": ["t.jsonl"], "held_out": ["h.jsonl"]}


def test_what_a_round_trains(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(
        'output = "out"\nmodel = "m"\ntasks = ["t"]\nheld_out = ["h"]\nseed = 3\ndata = ["more.jsonl"]\n'
        '[draw]\nn = 2\nstop = ["x"]\ntemperature = 1\n[select]\nchoose = "random"\n'
        '[run.model]\ndtype = "float32"\n[run.data]\nmax_length = 64\n[run.train]\nmax_steps = 7\n'
    )
    plan = load_plan(path)
    assert (plan.draw.n, plan.draw.stop, plan.draw.temperature, plan.select.choose) == (2, ("x",), 1.0, "random")
    config = plan.training(2, Path("new"), [Path("a.jsonl"), Path("b.jsonl")])
    assert config.output == "out/round-2/run"
    assert (config.seed, config.model.path, config.model.dtype) == (3002, "new", "float32")
    assert config.data.train == ["a.jsonl", "b.jsonl", "more.jsonl"]
    assert (config.data.max_length, config.train.max_steps) == (64, 7)
    seeds = {load_plan(LEAST | {"seed": s}).seed_of(n) for s in range(3) for n in range(1, 1000)}
    assert len(seeds) == 3 * 999


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"round": 2}, "plan: unknown key 'round'; did you mean 'rounds'?"),
        ({"draw": {"temprature": 2}}, "plan: unknown key 'draw.temprature'; did you mean 'temperature'?"),
        ({"select": {"nearall": 2}}, "plan: unknown key 'select.nearall'; did you mean 'near_all'?"),
        ({"run": {"optim": {"learning": 2}}}, "plan: run: unknown key 'optim.learning'"),
        ({"run": {"train": {"epochs": 0}}}, "plan: run: train.epochs: expected at least 1, got 0"),
        ({"run": {"seed": 1}}, "plan: run.seed: expected nothing, each round sets it; got 1"),
        ({"run": {"model": {"path": "x"}}}, "plan: run.model.path: expected nothing"),
        ({"run": {"model": {"init": {}}}}, "plan: run.model.init: expected nothing"),
        ({"run": {"data": {"train": ["x"]}}}, "plan: run.data.train: expected nothing"),
        ({"draw": {"seed": 1}}, "plan: draw.seed: expected nothing"),
        ({"rounds": 0}, "plan: rounds: expected a number from 1 to 999, got 0"),
        ({"rounds": "3"}, "plan: rounds: expected a number, got '3'"),
        ({"draw": {"n": True}}, "plan: draw.n: expected a number, got True"),
        ({"restart": 1}, "plan: restart: expected true or false, got 1"),
        ({"seed": -1}, "plan: seed: expected at least 0, got -1"),
        ({"tasks": []}, "plan: tasks: expected at least one file"),
        ({"tasks": "t.jsonl"}, "plan: tasks: "),
        ({"draw": 3}, "plan: draw: "),
        ({"select": {"choose": "best"}}, "plan: select.choose: "),
    ],
)
def test_refusals(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_plan(LEAST | given)
    assert str(error.value).startswith(message)


def test_missing_keys_and_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="plan: model: Field required"):
        load_plan({k: v for k, v in LEAST.items() if k != "model"})
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot read"):
        load_plan(tmp_path / "nowhere.toml")
    (tmp_path / "broken.toml").write_text("[draw\n")
    with pytest.raises(ConfigError, match=r"broken\.toml: not valid TOML"):
        load_plan(tmp_path / "broken.toml")
