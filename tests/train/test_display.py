"""What a run prints on a terminal."""

from __future__ import annotations

import sys

import pytest

from fastsft.train.metrics import Display


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
