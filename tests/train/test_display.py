"""What a run prints on a terminal."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from resume_cases import small, train

from fastsft.train.metrics import Display, read_metrics


def test_notes_on_a_terminal_are_not_read_as_markup(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sample may hold anything in brackets, also what rich would take for a closing tag without an opening one."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    text = "step 2: 'x' -> '[/INST] [bold]a[i][/b]' " + "word " * 60 + "end"
    display = Display(4, 0, enabled=True)
    display.note(text)
    display.close()
    assert text in capsys.readouterr().err


def test_speed_and_mfu_are_those_of_all_steps(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures that stand side by side are of the same steps, and those of the report."""
    shown: list[tuple[float, float]] = []
    monkeypatch.setattr(Display, "update", lambda self, step, loss, speed, mfu: shown.append((speed, mfu)))
    train(small(texts, tmp_path / "run"))
    steps = [m for m in read_metrics(tmp_path / "run" / "metrics.jsonl") if m["kind"] == "step"]
    assert len(steps) > 1
    seconds = sum(m["seconds"] for m in steps)
    speed, mfu = shown[-1]
    assert speed == pytest.approx(sum(m["tokens"] for m in steps) / seconds)
    assert mfu == pytest.approx(sum(m["mfu"] * m["seconds"] for m in steps) / seconds)
