"""The stages of ``prepare`` on disk: rows come back as they were, and nothing that is finished is done again."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastsft.config import Config, load_config
from fastsft.data import dedup as in_memory
from fastsft.data import prepare as module
from fastsft.data.prepare import prepare
from fastsft.data.records import Problems, Record, read_records
from fastsft.data.spool import Spool, write_spool

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def records() -> list[Record]:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1, None, 2.5, "é"]}}}]}
    return [
        Record("text", "a.jsonl:1", parts=("\u2028 line\n\0 é \U0001f600",)),
        Record("prompt_completion", "b.jsonl:2", parts=("", "x"), weight=0.25, origin=3, skills=("a b", "é")),
        Record("fim", "c c.jsonl:9", parts=("a", "b", "")),
        Record("messages", "d:1", messages=({"role": "user", "content": "q"}, call), tools=({"type": "function"},)),
        Record("messages", "d:2", messages=({"role": "user", "content": "q"},), tools=()),
    ]


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    write_spool(tmp_path / "rows", iter(records()), lambda: {"read": 5})
    spool = Spool(tmp_path / "rows")
    assert list(spool) == records()
    assert spool[1:4] == records()[1:4]
    assert spool[-1] == records()[-1]
    assert list(spool.take(np.array([4, 0]))) == [records()[4], records()[0]]
    assert spool.manifest == {"read": 5}
    assert spool.origins.tolist() == [0, 3, 0, 0, 0]
    assert list(read_records([spool.path], Problems("fail"))) == [
        dataclasses.replace(r, source=f"{spool.path}:{i}", origin=0) for i, r in enumerate(records(), 1)
    ]
    write_spool(tmp_path / "none", [], dict)
    assert list(Spool(tmp_path / "none")) == []


def config_of(tmp_path: Path, output: str = "run", **data: Any) -> Config:
    """Rows of which some are equal, many similar, some broken, and one in an evaluation file."""
    path = tmp_path / "rows.jsonl"
    if not path.exists():
        rng = random.Random(5)
        rows: list[Any] = [{"text": " ".join(rng.choices(WORDS, k=30))} for _ in range(120)]
        rows += [{"text": rows[i]["text"] + " more"} for i in range(0, 60, 3)] + rows[:10]
        rows += [{"messages": [{"role": "user", "content": f"q {i % 5}"}, {"role": "assistant", "content": "a"}]}
                 for i in range(20)]  # fmt: skip
        rng.shuffle(rows)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
        held = next(row for row in rows if "text" in row and "more" not in row["text"])
        (tmp_path / "bench.jsonl").write_text(json.dumps({"question": held["text"]}) + "\n")
    options: dict[str, Any] = {
        "train": [str(path)], "eval_fraction": 0.2, "max_bad": 0.1, "filters": {"mask": ["email"]},
        "dedup": {"mode": "near", "threshold": 0.6}, "decontaminate": {"against": [str(tmp_path / "bench.jsonl")]},
    }  # fmt: skip
    return load_config(
        {"output": str(tmp_path / output), "tokenizer": {"train_vocab": 320}, "data": {**options, **data}}
    )


def files(config: Config) -> dict[str, bytes]:
    return {str(p.relative_to(config.output)): p.read_bytes() for p in Path(config.output).rglob("*") if p.is_file()}


@pytest.mark.parametrize("mode", ["near", "exact"])
def test_duplicates_are_those_of_rows_in_memory(mode: Any, tmp_path: Path) -> None:
    config = config_of(tmp_path, dedup={"mode": mode, "threshold": 0.6}, decontaminate={})
    rows = list(read_records(config.data.train, Problems("skip")))
    expected = in_memory.dedup(rows, mode=mode, threshold=0.6, seed=config.seed)
    report = prepare(config).report
    assert report["dedup"] == json.loads(json.dumps(expected.to_dict()))
    assert report["train"]["samples"] + report["eval"]["samples"] == expected.keep.sum()
    assert (expected.near_duplicates > 10) == (mode == "near")


class StoppedError(Exception):
    pass


def stopped(*args: Any, **kwargs: Any) -> Any:
    raise StoppedError


@pytest.mark.parametrize("stage", ["select", "load_tokenizer", "tokenise_to_store", "_by_source"])
def test_what_is_finished_is_not_done_again(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in one stage, the stages before it do not run a second time."""
    whole = config_of(tmp_path, "whole")
    prepare(whole)
    assert {p.name for p in next((tmp_path / "whole" / "data").iterdir()).iterdir()} == {
        "train", "eval", "tokenizer", "report.json"
    }  # fmt: skip
    stages = {"select": "read_records", "load_tokenizer": "select", "tokenise_to_store": "load_tokenizer"}
    with monkeypatch.context() as patch:
        patch.setattr(module, stage, stopped)
        with pytest.raises(StoppedError):
            prepare(config_of(tmp_path))
    before, name = [], stage
    while name := stages.get(name, "tokenise_to_store" if name == "_by_source" else ""):
        before += [name] * (name != "tokenise_to_store")
    with monkeypatch.context() as patch:
        for name in before:
            patch.setattr(module, name, stopped)
        prepare(config_of(tmp_path))
    assert files(config_of(tmp_path)) == files(whole)
