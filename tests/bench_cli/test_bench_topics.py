"""The table of topics against the files of the suite, and what the suite needs around it."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

from fastsft.bench import topics
from fastsft.bench.topics import TOPICS, Topic, chosen, missing, suite, topic_of


def test_every_bench_has_one_topic() -> None:
    files = sorted(path.stem.removeprefix("bench_") for path in suite().glob("bench_*.py"))
    assert sorted(stem for topic in TOPICS.values() for stem in topic.benches) == files
    assert len(files) > 25
    assert topic_of("fim_rows") == "fim"


def test_every_bench_says_what_it_measures() -> None:
    for path in suite().glob("bench_*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path.name


def test_chosen() -> None:
    assert chosen(["all"]) == TOPICS
    assert list(chosen(["loss", "fim", "loss"])) == ["loss", "fim"]
    with pytest.raises(ValueError, match="did you mean 'attention'"):
        chosen(["atention"])
    with pytest.raises(ValueError, match="expected all or topics among attention, loss"):
        chosen([])


def test_the_suite_of_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no checkout is around the package, it is the folder that CMake installs into it."""
    assert suite() == Path(__file__).parents[2] / "bench"
    monkeypatch.setattr(topics, "__file__", str(tmp_path / "site" / "fastsft" / "bench" / "topics.py"))
    assert suite() == tmp_path / "site" / "fastsft" / "bench" / "suite"
    assert "DESTINATION bench/suite" in (Path(__file__).parents[2] / "CMakeLists.txt").read_text()


def test_missing() -> None:
    assert missing([Topic("", (), ("json", "no_such_module")), Topic("", (), ("no_such_module",))]) == [
        "no_such_module"
    ]
    assert importlib.util.find_spec("no_such_module") is None
