"""train: resumed, interrupted, from a saved configuration, with flags."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from cli_cases import conversations, refusal, result_of, write

from fastsft import cli
from fastsft.train.update import Update


def test_train_again_finds_itself_finished(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = result_of(capsys, "train", trained / "run.toml")
    assert result["resumed_from"] == result["steps"] == 2
    assert Path(result["model_path"]) == trained / "run" / "model"
    assert result["tokens_per_second"] is None
    assert result["train_loss"] > 0
    cli.main(["train", str(trained / "run.toml")])
    assert "2 steps, finished before; held-out loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verb", "after"), [("train", "goes on from the newest checkpoint, if there is one"), ("prepare", "begins anew")]
)
def test_interrupt_is_one_line(
    verb: str, after: str, trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        """Stands in for the verb."""
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, verb, (interrupted, True))
    with pytest.raises(SystemExit) as end:
        cli.main([verb, str(trained / "run.toml")])
    assert end.value.code == 130
    message = f"fastsft: interrupted; the same command {after}"
    assert capsys.readouterr().err.strip().splitlines() == [message]


@pytest.mark.parametrize(
    ("verb", "after"), [("train", "goes on from the newest checkpoint, if there is one"), ("demo", "begins anew")]
)
def test_interrupted_training_says_what_the_same_command_does(
    verb: str, after: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    def signalled(*args: Any) -> None:
        """Ctrl-C in the first step."""
        if threading.current_thread() is threading.main_thread():
            os.kill(os.getpid(), signal.SIGINT)
        return update(*args)

    update = Update.__call__
    monkeypatch.setattr(Update, "__call__", signalled)
    given = [trained / "run.toml", "--output", tmp_path / "x"] if verb == "train" else ["--quick", "--output", tmp_path]
    with pytest.raises(SystemExit) as end:
        cli.main([verb, *map(str, given)])
    assert end.value.code == 130
    error = capsys.readouterr().err
    assert "signal 2: saved step 1 in " in error
    assert error.endswith(f"\nfastsft: interrupted; the same command {after}\n")
    assert error.count("same command") == 1


def test_a_saved_configuration_runs_again(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, again = (trained / "run" / "config.json"), tmp_path / "again"
    assert result_of(capsys, "train", first, "--output", again)["steps"] == 2
    weights = "model/model.safetensors"
    assert (again / weights).read_bytes() == (trained / "run" / weights).read_bytes()
    (tmp_path / "x.json").write_text("{")
    assert "x.json: not valid JSON" in refusal(capsys, "train", tmp_path / "x.json")


def test_flags_override_the_file(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = write(tmp_path / "more.jsonl", conversations(60))
    result = result_of(
        capsys, "train", trained / "run.toml", "--output", tmp_path / "x", "--data", more, "--train.max-steps", "1"
    )
    assert result["steps"] == 1
    saved = json.loads((tmp_path / "x" / "config.json").read_text())
    assert saved["data"]["train"] == [str(more)]
    assert saved["tokenizer"]["train_vocab"] == 300  # from the file


def test_dry_run(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "x"
    plan = result_of(capsys, "train", trained / "run.toml", "--output", target, "--dry-run")
    assert plan["stages"][0]["steps"] == 2
    assert plan["tokens_per_second"] > 0
    assert plan["memory"]["weights"] == 4 * plan["parameters"]
    cli.main(["train", str(trained / "run.toml"), "--output", str(target), "--dry-run"])
    shown = capsys.readouterr().out
    for expected in ("nll: sum of token weight", " of tensors, and", "tokens/s", "unusual: 2 steps", "rows.jsonl:"):
        assert expected in shown, expected
    assert re.search(r"«number \d+!", shown)  # what is trained of the first batch
    assert {p.name for p in target.iterdir()} == {"data", ".lock"}
