"""Options of what is seen of a run while it goes on: trackers, samples, solved tasks."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastsft.config.section import Section


@dataclass(frozen=True)
class LogOptions(Section):
    """Trackers that get what metrics.jsonl gets."""

    tensorboard: bool = False
    """Event files in the run's folder ``tensorboard``."""
    wandb: str | None = None
    """Project of Weights & Biases."""
    trackio: str | None = None
    """Project of trackio."""


@dataclass(frozen=True)
class SamplesOptions(Section):
    """Texts that the model writes while it is trained."""

    prompts: list[str] = field(default_factory=list)
    """Texts to continue."""
    chat: list[str] = field(default_factory=list)
    """Messages to answer."""
    every: int = 100
    """Steps; 0: only before the first and after the last."""
    max_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class EvalOptions(Section):
    """Tasks that the model solves while it is trained: answers are executed in the sandbox."""

    tasks: str | None = None
    """Their file."""
    n: int = 1
    """Answers to each task."""
    k: list[int] = field(default_factory=lambda: [1])
    every: int = 0
    """Steps; 0: only before the first and after the last."""
    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    completion: bool = False
    """Continue the prompt as it is, not as a chat message."""
    stop: list[str] = field(default_factory=list)
    """Strings that end an answer."""
