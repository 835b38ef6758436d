"""Short runs in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kill_resume import run_config

from fastsft.config import load_config
from fastsft.train.trainer import Trainer


def small(texts: Path, output: Path, **train: Any) -> dict[str, Any]:
    return run_config(texts, output, steps=4, **train)


def train(config: dict[str, Any]) -> tuple[Trainer, Any]:
    trainer = Trainer(load_config(config), progress=False)
    return trainer, trainer.run()
