"""Weights of rows by their skills."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastsft.config import ConfigError, load_config
from fastsft.data.dedup_files import dedup_files
from fastsft.data.link import LinkOptions
from fastsft.data.prepare import Prepared, prepare
from fastsft.data.problems import DataError, Problems
from fastsft.data.scan import SketchOptions

ROWS: list[dict[str, Any]] = [
    {"text": "for", "skills": ["loops"]},
    {"text": "while f", "skills": ["loops", "recursion"], "weight": 2},
    {"text": "f f", "skills": ["recursion", "naïve"]},
    {"text": "x", "skills": None},
    {"text": "y"},
]


def prepared(tmp_path: Path, rows: list[dict[str, Any]], **data: Any) -> Prepared:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"train": [str(path)], "eval_fraction": 0.0, **data}
    return prepare(
        load_config({"output": str(tmp_path / "run"), "tokenizer": {"train_vocab": 262}, "data": given})
    )  # fmt: skip


def test_a_row_weighs_the_mean_of_its_skills(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    found = prepared(tmp_path, ROWS, skills={"loops": 3.0, "recursion": 0.5}, eval=[str(rows)])
    assert [{*found.train[i].weights.tolist()} for i in range(5)] == [{3.0}, {3.5}, {0.75}, {1.0}, {1.0}]
    assert [{*found.eval[i].weights.tolist()} for i in range(5)] == [{1.0}, {2.0}, {1.0}, {1.0}, {1.0}]
    expected = [("loops",), ("loops", "recursion"), ("recursion", "naïve"), (), ()]
    for store in (found.train, found.eval):
        assert store.skills == [store[i].skills for i in range(5)] == expected
    assert found.report["without_effect"] == []


def test_skills_under_another_name(tmp_path: Path) -> None:
    rows = [{"body": "for", "tags": ["loops"], "skills": "not these"}, {"body": "x"}]
    fields = {"text": "body", "skills": "tags"}
    found = prepared(tmp_path, rows, fields=fields, skills={"loops": 2.0, "lops": 3.0})
    assert [{*found.train[i].weights.tolist()} for i in range(2)] == [{2.0}, {1.0}]
    assert found.report["without_effect"] == ["without effect: data.skills.lops: no training row has this skill"]


@pytest.mark.parametrize("skills", ["loops", [1], {"loops": 1}, ["a", None]])
def test_skills_that_are_none(skills: Any, tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "b", "skills": skills}]
    with pytest.raises(DataError, match=r"rows\.jsonl:2: wrong type: skills: expected a list of strings, got"):
        prepared(tmp_path, rows)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: wrong type: skills"):  # the native reader's rows, too
        dedup_files([tmp_path / "rows.jsonl"], None, Problems("fail"), sketch=SketchOptions("exact"), how=LinkOptions())


@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_weights_out_of_range(weight: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.skills\.loops: expected more than 0, got"):
        load_config({"data": {"train": ["a.jsonl"], "skills": {"loops": weight}}})
