"""One process per output folder."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastsft.config import ConfigError, load_config
from fastsft.data.lock import hold, remove_held
from fastsft.data.prepare import prepare

HOLDER = """
import sys
from pathlib import Path
from fastsft.data.lock import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    output = tmp_path / "runs" / "a"
    command = [sys.executable, "-c", HOLDER, str(output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"{re.escape(str(output))} is in use .* \\(process {process.pid}\\)"):
            hold(output).__enter__()
        process.kill()
    with hold(output):
        assert (output / ".lock").read_text() == str(os.getpid())
    with hold(tmp_path / "runs" / "b"), hold(output):
        pass


def test_a_lock_that_its_holder_removes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process that has opened the file by then must lock the new one, as a third would."""
    folder = tmp_path / "work"
    flock, first = fcntl.flock, hold(folder)
    first.__enter__()

    def let_go_first(stream: Any, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        remove_held(folder)
        first.__exit__(None, None, None)
        flock(stream, how)

    monkeypatch.setattr(fcntl, "flock", let_go_first)
    with hold(folder):
        assert (folder / ".lock").exists()
        with pytest.raises(ConfigError, match="is in use by another run"):
            hold(folder).__enter__()
        (folder / "mine").touch()
        remove_held(folder)
    assert [p.name for p in folder.iterdir()] == ["mine"]


def test_data_are_not_prepared_in_a_folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 2)
    config = load_config(
        {
            "output": str(tmp_path / "run"),
            "data": {"train": [str(tmp_path / "a.jsonl")], "eval_fraction": 0.0},
            "tokenizer": {"train_vocab": 300},
        }
    )
    with hold(tmp_path / "run"), pytest.raises(ConfigError, match="in use"):
        prepare(config)
    prepare(config)
    with hold(tmp_path / "run"):
        prepare(config)  # reads what is there
