"""fastsft check on what a run leaves."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from cli_cases import refusal, result_of

from fastsft import cli

pytest.importorskip("transformers")


def test_check(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained / "run" / "model"
    result = result_of(capsys, "check", model)
    assert result["ok"] is True
    assert {f["what"]: f["ok"] for f in result["findings"]}["chat template"] is True
    cli.main(["check", str(model), "--dtype", "bfloat16"])
    assert capsys.readouterr().out.startswith("ok     loads here: qwen2, ")


def test_what_is_wrong_is_the_exit_status(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = shutil.copytree(trained / "run" / "model", tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"x")
    with pytest.raises(SystemExit) as end:
        cli.main(["check", str(model)])
    assert end.value.code == 1
    out = capsys.readouterr().out
    assert "WRONG  loads here: ValueError: " in out
    assert "ok     chat template" in out  # what can still be looked at is


def test_refusals(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "nowhere: expected a folder" in refusal(capsys, "check", tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install transformers" in refusal(capsys, "check", trained / "run" / "model")
