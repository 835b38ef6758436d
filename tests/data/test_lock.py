"""One process per output folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastsft.config import ConfigError, load_config
from fastsft.data.lock import hold
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
