"""The order of a round's parts, what goes into each, and going on after a kill; the model is a stand-in that learns."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from synthesis_cases import TASKS, Engine, judged_here, model_files

from fastsft.config import Config, ConfigError
from fastsft.synthesis import draw as drawing
from fastsft.synthesis import iterate as iterating
from fastsft.synthesis.iterate import iterate
from fastsft.synthesis.plan import load_plan

RUNS: list[Config] = []


class Killed(BaseException):
    """What no handler expects."""


class Learner:
    """Leaves a model that is told from others by how many rows it saw."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self) -> Any:
        RUNS.append(self.config)
        folder = Path(self.config.output)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "model").is_dir():
            model_files(folder / "model")
        rows = [Path(f).read_text() for f in self.config.data.train]
        (folder / "model" / "model.safetensors").write_text("".join(rows) + Path(self.config.output).parent.name)
        return SimpleNamespace(model_path=folder / "model", train_loss=0.5)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "LLM", Engine)
    monkeypatch.setattr(drawing, "judge", judged_here)
    monkeypatch.setattr(iterating, "Trainer", Learner)
    RUNS.clear()


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    model_files(tmp_path / "model")
    for name, tasks in (("tasks", TASKS[1:10]), ("held_out", TASKS[14:])):
        rows = [{"task_id": t.task_id, "prompt": t.prompt, "check": t.check} for t in tasks]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return {
        "output": str(tmp_path / "out"), "model": str(tmp_path / "model"), "tasks": [str(tmp_path / "tasks.jsonl")],
        "held_out": [str(tmp_path / "held_out.jsonl")], "draw": {"n": 4, "max_tokens": 8}, "rounds": 2,
    }  # fmt: skip


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_rounds(given: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text("")
    said: list[str] = []
    rounds = iterate(load_plan(given | {"data": [str(tmp_path / "more.jsonl")]}), say=said.append)
    assert [r["round"] for r in rounds] == [0, 1, 2]
    assert rounds[0]["model"] == given["model"]
    out = tmp_path / "out"
    data = [str(out / f"round-{n}" / "data.jsonl") for n in (1, 2)]
    more = str(tmp_path / "more.jsonl")
    assert [c.data.train for c in RUNS] == [[data[0], more], [*data, more]]  # mixed with those of earlier rounds
    assert [c.model.path for c in RUNS] == [given["model"], str(out / "round-1/run/model")]  # the newest is trained on
    assert [c.seed for c in RUNS] == [1, 2]
    written = [len(Path(f).read_text().splitlines()) for f in data]
    assert [r["rows"] for r in rounds[1:]] == [written[0], sum(written)]
    plans = [json.loads((out / f"round-{n}/data.jsonl.samples/plan.json").read_text()) for n in (1, 2)]
    assert plans[0]["model"] != plans[1]["model"]  # round 2 samples from what round 1 trained
    assert [p["options"]["seed"] for p in plans] == [1, 2]
    for n in (0, 1, 2):
        place = out / "held_out" if n == 0 else out / f"round-{n}" / "held_out"
        plan = json.loads((place / "plan.json").read_text())
        assert (plan["options"]["n"], plan["options"]["temperature"]) == (1, 0.0)
        samples = [json.loads(line)["samples"] for line in (place / "samples.jsonl").read_text().splitlines()]
        passed = sum(s[0]["failure"] is None for s in samples)
        assert rounds[n]["held_out_pass_at_1"] == passed / 6
    assert said[0].startswith("before: held-out pass@1 ")
    assert json.loads((out / "results.json").read_text()) == rounds


def test_restart_trains_the_first_model(given: dict[str, Any]) -> None:
    iterate(load_plan(given | {"restart": True}))
    assert [c.model.path for c in RUNS] == [given["model"]] * 2


@pytest.mark.parametrize("fatal", range(14))
def test_killed_anywhere(fatal: int, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the n-th of the moments when something is about to be done: the next call ends as one that was not killed."""
    plan, other = load_plan(given), load_plan(given | {"output": str(tmp_path / "other")})
    count = iter(range(100))

    def mortal(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if next(count) == fatal:
                raise Killed
            return function(*args, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(drawing, "judge", mortal(judged_here))
        patch.setattr(Learner, "run", mortal(Learner.run))
        patch.setattr(iterating, "write_file", mortal(iterating.write_file))
        patch.setattr(iterating, "sample_tasks", mortal(iterating.sample_tasks))
        if fatal < 13:
            with pytest.raises(Killed):
                iterate(plan)
        else:
            iterate(plan)
    iterate(plan)
    iterate(other)
    found, expected = (
        {name: data.replace(str(f).encode(), b"") for name, data in files(f).items()}
        for f in (tmp_path / "out", tmp_path / "other")
    )
    assert found == expected


def test_a_finished_round_is_not_touched(given: dict[str, Any]) -> None:
    rounds = iterate(load_plan(given))
    assert iterate(load_plan(given)) == rounds
    assert len(RUNS) == 2
    assert [r["round"] for r in iterate(load_plan(given | {"rounds": 3}))] == [0, 1, 2, 3]
    assert len(RUNS) == 3


def test_refusals(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"held_out: expected other tasks than those sampled, got 'Set x to 1\.'"):
        iterate(load_plan(given | {"held_out": [*given["held_out"], *given["tasks"]]}))
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"none\.jsonl: no task"):
        iterate(load_plan(given | {"tasks": [str(tmp_path / "none.jsonl")]}))
    iterate(load_plan(given))
    with pytest.raises(ConfigError, match="has rounds of another plan, which differs in restart, draw"):
        iterate(load_plan(given | {"draw": {"n": 5}, "restart": True}))


def test_nothing_to_train_on(given: dict[str, Any], tmp_path: Path) -> None:
    row = {"task_id": "t/0", "prompt": "Set x to 0.", "check": "assert x == 0"}  # which the stand-in never solves
    (tmp_path / "tasks.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="round 1: none of 4 samples became a row"):
        iterate(load_plan(given))
    assert not RUNS
