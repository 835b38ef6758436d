"""Saves are whole or absent, whatever happens on the way."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from weights_cases import LLAMA, equal_weights, files_of

from fastsft.models import weights
from fastsft.models.weights import init_model, load_model, save_model


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
