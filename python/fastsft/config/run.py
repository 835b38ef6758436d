"""Options of a run: the model, how it is trained, and everything together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from fastsft.config.data import DataOptions
from fastsft.config.section import Section


@dataclass(frozen=True)
class ModelOptions(Section):
    """Which model to train: a Hugging Face folder, or a fresh one from architecture fields."""

    path: str | None = None
    """Folder with config.json, *.safetensors and tokenizer.json."""
    init: dict[str, Any] = field(default_factory=dict)
    """Fields of a config.json (model_type, hidden_size, ...) for a randomly initialised model. Excludes ``path``."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute type. With bfloat16 the optimizer keeps float32 master weights."""


@dataclass(frozen=True)
class TokenizerOptions(Section):
    path: str | None = None
    """tokenizer.json or its folder. Default: the model's folder."""
    train_vocab: int | None = None
    """Train a byte-level BPE of this size on the training texts (only for a freshly initialised model)."""


@dataclass(frozen=True)
class OptimOptions(Section):
    lr: float = 2e-5
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled (AdamW), on matrices only: not on norms, biases and embeddings."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""


@dataclass(frozen=True)
class ScheduleOptions(Section):
    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.03
    """Below 1 a fraction of all steps, otherwise a number of steps."""
    final: float = 0.0
    """Learning rate at the end as a fraction of the peak."""


@dataclass(frozen=True)
class TrainOptions(Section):
    tokens_per_batch: int = 8192
    """Capacity of one packed micro-batch."""
    accumulation: int = 1
    """Micro-batches per optimizer step; normalised together by their summed token weights."""
    epochs: int = 1
    max_steps: int | None = None
    """Optimizer steps; ends the run before ``epochs`` do."""
    activation_checkpointing: bool = False
    eval_every: int = 100
    """Optimizer steps between evaluations; 0 evaluates only before the first and after the last step."""
    save_every: int = 100
    """Optimizer steps between checkpoints; 0 saves only the last."""
    keep: int = 2
    """Checkpoints kept."""


@dataclass(frozen=True)
class Config(Section):
    """Everything that determines a run. The same Config and data give the same weights, bit for bit on a CPU."""

    output: str = "runs/run"
    """Folder of the run: checkpoints, metrics and the model."""
    seed: int = 0
    """Of everything random: initial weights, held-out rows, infilling, order."""
    model: ModelOptions = field(default_factory=ModelOptions)
    tokenizer: TokenizerOptions = field(default_factory=TokenizerOptions)
    data: DataOptions = field(default_factory=DataOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
