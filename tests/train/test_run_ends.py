"""What a run leaves behind in the process, and what it refuses before it has cost anything."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
from resume_cases import small, train

from fastsft.config import ConfigError, load_config
from fastsft.train import trainer as module
from fastsft.train.metrics import Display, MetricsLog
from fastsft.train.settling import settling
from fastsft.train.trainer import Trainer


@pytest.mark.parametrize("frozen_before", [False, True])
def test_objects_frozen_by_a_caller_stay_so(frozen_before: bool) -> None:
    gc.unfreeze()
    try:
        if frozen_before:
            gc.freeze()
        before = gc.get_freeze_count()
        with settling() as settle:
            settle()
            assert gc.get_freeze_count() > 0
            # its own garbage would stay for ever beside what the caller has frozen
            assert not frozen_before or gc.get_freeze_count() <= before
        assert (gc.get_freeze_count() > 0) == frozen_before
    finally:
        gc.unfreeze()


def test_an_error_before_the_first_step_closes_display_and_log(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    for name, kind in (("Display", Display), ("MetricsLog", MetricsLog)):
        inner = kind.close

        def close(self: Any, name: str = name, inner: Any = inner) -> None:
            closed.append(name)
            inner(self)

        monkeypatch.setattr(kind, "close", close)

    def broken(self: Trainer) -> str:
        raise RuntimeError("no plan")

    monkeypatch.setattr(module.Trainer, "_plan", broken)
    with pytest.raises(RuntimeError, match="no plan"):
        train(small(texts, tmp_path / "run"))
    assert sorted(closed) == ["Display", "MetricsLog"]


@pytest.mark.parametrize("fault", ["missing", "short"])
def test_a_reference_is_looked_at_before_the_data(fault: str, texts: Path, tmp_path: Path) -> None:
    path = tmp_path / "reference"
    if fault == "short":
        _, first = train(small(texts, tmp_path / "first"))
        path = first.model_path
        text = (path / "config.json").read_text()
        assert '"max_position_embeddings": ' in text
        lines = ['  "max_position_embeddings": 4,' if "max_position" in x else x for x in text.splitlines()]
        (path / "config.json").write_text("\n".join(lines))
    config = {**small(texts, tmp_path / "run"), "objective": {"name": "k3", "reference": str(path)}}
    with pytest.raises(
        ConfigError, match=r"objective\.reference: .*" + ("config.json" if fault == "missing" else "at most")
    ):
        Trainer(load_config(config), progress=False)
    assert not (tmp_path / "run" / "data").exists()
