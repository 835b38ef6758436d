"""Samples on disk in shards: the same bytes from any number of threads, and after any interruption."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fastsft.config import Config, load_config
from fastsft.data import cache, store
from fastsft.data.prepare import prepare
from fastsft.files import sync_tree
from fastsft.models.tokenizer import Tokenizer

ROWS = 300


def config_of(tmp_path: Path, output: str = "run") -> Config:
    path = tmp_path / "rows.jsonl"
    if not path.exists():
        (tmp_path / "tok").mkdir()
        markers = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
        Tokenizer.train(["alpha beta gamma"] * 9, 300, markers).save(tmp_path / "tok")
        rows: list[Any] = [{"text": f"alpha beta {i} " * (1 + 37 * i % 11)} for i in range(ROWS)]
        for i in range(0, ROWS, 10):
            rows[i] = {"messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": "a"}]}
        for i in range(5, ROWS, 50):
            rows[i] = {"messages": [{"role": "user", "content": "unanswered"}]}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_config(
        {"output": str(tmp_path / output), "tokenizer": {"path": str(tmp_path / "tok")},
         "data": {"train": [str(path)], "eval_fraction": 0.2, "max_bad": 0.1, "fim": {"rate": 0.5}}}
    )  # fmt: skip


def digest(output: Path) -> dict[str, str]:
    return {
        str(p.relative_to(output)): hashlib.blake2b(p.read_bytes()).hexdigest()
        for p in sorted((output / "data").rglob("*"))
        if p.is_file()
    }


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "RECORDS", 16)


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, str]:
    """Made at once, in one shard."""
    prepare(config_of(tmp_path, "whole"))
    return digest(tmp_path / "whole")


@pytest.mark.parametrize("threads", [1, 3])
def test_shards_and_threads_do_not_show(
    threads: int, whole: dict[str, str], small_shards: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(threads)))
    found = prepare(config_of(tmp_path))
    assert digest(tmp_path / "run") == whole
    assert found.report["skipped"]["nothing to train on"] == 6
    places = found.report["skipped_examples"]["nothing to train on"]
    assert [int(p.split(":")[1]) for p in places] == sorted(int(p.split(":")[1]) for p in places)
    assert len(places) == 5


def test_interrupted_after_every_write(
    whole: dict[str, str], small_shards: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt gets one write further; nothing that is there is made again."""
    tokenised: list[int] = []
    real, write, join = cache.tokenise, cache.write_store, cache.join_stores

    def counting(records: Any, *args: Any, first: int, **kwargs: Any) -> Any:
        tokenised.append(first)
        return real(records, *args, first=first, **kwargs)

    def once(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            function(*args, **kwargs)
            raise KeyboardInterrupt

        return call

    monkeypatch.setattr(cache, "tokenise", counting)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    attempts = 0
    while True:
        attempts += 1
        with monkeypatch.context() as patch:
            patch.setattr(cache, "write_store", once(write))
            patch.setattr(cache, "join_stores", once(join))
            try:
                prepare(config_of(tmp_path))
                break
            except KeyboardInterrupt:
                pass
    shards = len(set(tokenised))
    assert attempts > shards > 10
    assert digest(tmp_path / "run") == whole


def test_many_shards_need_few_open_files(
    whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(config_of(tmp_path, "warm"))  # what is opened once for the whole process
    monkeypatch.setattr(cache, "RECORDS", 2)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 40, limits[1]))
    try:
        prepare(config_of(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert digest(tmp_path / "run") == whole


def test_a_killed_join_leaves_nothing(whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class KilledError(BaseException):
        pass

    def killed(stage: Path) -> None:
        if not stage.parent.name.endswith(".parts"):
            raise KilledError
        sync_tree(stage)

    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 1)  # another process's
        patch.setattr(store, "sync_tree", killed)
        with pytest.raises(KilledError):
            prepare(config_of(tmp_path))
    prepare(config_of(tmp_path))
    assert digest(tmp_path / "run") == whole


CHILD = """
import sys
from fastsft.data import cache
from fastsft.data.prepare import prepare
from fastsft.config import load_config
cache.RECORDS = 4
prepare(load_config(sys.argv[1]))
"""


def test_killed_at_any_instant(whole: dict[str, str], tmp_path: Path) -> None:
    from fastsft.config import to_json

    settings = tmp_path / "config.json"
    settings.write_text(to_json(config_of(tmp_path)))
    parts, kills = tmp_path / "run" / "data", 0
    for wanted in (1, 9, 25, 10_000):
        process = subprocess.Popen([sys.executable, "-c", CHILD, str(settings)])
        while process.poll() is None:
            if len(glob.glob(f"{parts}/*/*.parts/*")) >= wanted:  # pathlib raises where a folder goes away
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        process.wait()
    assert kills == 3
    assert process.returncode == 0
    assert digest(tmp_path / "run") == whole
