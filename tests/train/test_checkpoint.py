"""Which checkpoints are kept, and which one counts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from kill_resume import newest, same_checkpoint, weights
from resume_cases import small, train

from fastsft.train import checkpoint


def test_keeps_as_many_checkpoints_as_asked(texts: Path, tmp_path: Path) -> None:
    train(small(texts, tmp_path / "run", keep=2))
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]


def test_damaged_newer_checkpoint_does_not_push_out_a_good_one(tmp_path: Path) -> None:
    """With keep=1 the checkpoint just written must survive, whatever broken folder has a higher number."""

    def fill(folder: Path) -> None:
        (folder / "file").write_text("content")

    checkpoint.write(tmp_path, 9, {"step": 9}, fill, keep=1)
    (tmp_path / "step-00000009" / "file").write_text("damaged")
    assert checkpoint.latest(tmp_path, lambda message: None) is None
    checkpoint.write(tmp_path, 1, {"step": 1}, fill, keep=1)
    found = checkpoint.latest(tmp_path, lambda message: None)
    assert found is not None
    assert found.step == 1


def test_failed_write_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "file").write_text("content")

    def full(folder: Path) -> None:
        (folder / "file").write_text("cont")
        raise OSError(28, "No space left on device")

    checkpoint.write(tmp_path, 1, {"step": 1}, fill, keep=1)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write(tmp_path, 2, {"step": 2}, full, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.verify(tmp_path / "step-00000001") is None


def test_background_checkpoints_hold_the_step_they_are_named_after(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the weights have changed by the time they are written."""
    train(small(texts, tmp_path / "plain", keep=9))
    write = checkpoint.write

    def slow(*arguments: Any, **named: Any) -> Path:
        time.sleep(0.1)
        return write(*arguments, **named)

    monkeypatch.setattr(checkpoint, "write", slow)
    train(small(texts, tmp_path / "beside", keep=9, async_save=True))
    for step in range(1, 5):
        assert same_checkpoint(tmp_path / "beside", tmp_path / "plain", step), step
    assert weights(tmp_path / "beside" / "model") == weights(tmp_path / "plain" / "model")


@pytest.mark.parametrize("at", [2, 4])
def test_background_failures_end_the_run(at: int, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one's too; what was saved before stays, and the run goes on from it."""
    config = small(texts, tmp_path / "run", keep=9, async_save=True)
    write = checkpoint.write

    def full(root: Path, step: int, *arguments: Any, **named: Any) -> Path:
        if step == at:
            raise OSError(28, "No space left on device")
        return write(root, step, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", full)
        with pytest.raises(OSError, match="No space"):
            train(config)
    assert not (tmp_path / "run" / "model").exists()
    assert newest(tmp_path / "run") == at - 1
    assert train(config)[1].resumed_from == at - 1
