"""How far a run is, and what it did."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsft.train.checkpoint import Checkpoint
from fastsft.train.evaluate import EvalResult
from fastsft.train.watch import Early


@dataclass(frozen=True)
class TrainResult:
    """What a run did."""

    steps: int
    model_path: Path
    train_loss: float
    """Of the last step, also where a process before this one made it."""
    eval_before: EvalResult | None
    eval_after: EvalResult | None
    tokens_per_second: float | None
    """All tokens of the steps of this process (padding does not exist) over their time; None if it made no step."""
    resumed_from: int
    data: dict[str, Any]
    """The report on the data: what was read, what was left out and why."""
    early: Early | None
    """Loss and gradient norm of the first steps, which foretell which of several runs will be the better one."""


@dataclass
class Progress:
    """How far a run is. ``begun``: the steps of each stage that was begun; ``stage``: the state of the last of them."""

    step: int = 0
    loss: float = math.nan
    before: EvalResult | None = None
    begun: list[int] = field(default_factory=list)
    stage: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, found: Checkpoint) -> Progress:
        state, before = found.state, found.state["eval_before"]
        return cls(
            found.step, state["train_loss"], EvalResult(**before) if before else None, state["stages"], state["stage"]
        )

    def state(self) -> dict[str, Any]:
        """Its part of a checkpoint's trainer.json."""
        return {
            "step": self.step, "train_loss": self.loss, "stages": self.begun, "stage": self.stage,
            "eval_before": None if self.before is None else dataclasses.asdict(self.before),
        }  # fmt: skip
