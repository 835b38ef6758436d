"""Options of a run: the model, how it is trained, and everything together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from fastsft.config.data import DataOptions
from fastsft.config.section import Section
from fastsft.config.watching import EvalOptions, LogOptions, SamplesOptions


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
class LoraOptions(Section):
    """Adapters (arXiv 2106.09685) instead of all weights."""

    rank: int = 0
    """0: all weights are trained."""
    alpha: float = 32.0
    """The adapters' product is scaled by alpha / rank."""
    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Ends of the names of the blocks' linear layers."""


@dataclass(frozen=True)
class ObjectiveOptions(Section):
    """What is minimised: a weighted loss of tokens, and what their sum is divided by."""

    name: str = "nll"
    """One of ``fastsft.ops.linear_cross_entropy``'s objectives, e.g. "dft", "pear_token", "asft"."""
    args: dict[str, Any] = field(default_factory=dict)
    """Its arguments; the others keep their defaults."""
    reference: str | None = None
    """Folder of the policy that an objective compares with; unset: the model as the run found it."""
    reduction: Literal["token", "sequence", "constant"] = "token"
    """The divisor of a step's summed loss: the weight of its tokens, the number of its samples (of which each is the
    weighted mean of its tokens), or ``constant``."""
    constant: float | None = None
    label_smoothing: float = 0.0
    """Only with nll."""
    z_loss: float = 0.0
    """Times the squared logarithm of the softmax's denominator, added to each token's loss."""
    neftune: float = 0.0
    """Noise on the embeddings of a sample of n tokens and size d, uniform within neftune / sqrt(n d) (2310.05914)."""


@dataclass(frozen=True)
class StageOptions(Section):
    """One of several parts of a run, ``[[stages]]``: the model and the optimizer's state go on, the schedule anew."""

    name: str
    epochs: int = 1
    max_steps: int | None = None
    """Optimizer steps; ends the stage before ``epochs`` do."""
    lr: float | None = None
    """Peak learning rate; unset: ``optim.lr``."""
    weights: dict[str, float] = field(default_factory=dict)
    """Name of a source = times that an epoch goes through it; those not named are left out. Empty: as in ``data``."""
    ratios: dict[str, float] | None = None
    """Instead of ``data.ratios``; empty: none."""
    drop_easy: float = 0.0
    """Share of the stage's samples left out: those of the smallest loss per token under the model that begins it."""
    curriculum: Literal["none", "ucb"] = "none"
    """ucb: the sources' shares follow recent learning progress (upper confidence bounds, arXiv 2504.09710); needs
    ``max_steps``."""
    curriculum_steps: int = 20
    """About as many steps between two choices of the shares."""


@dataclass(frozen=True)
class OptimOptions(Section):
    kind: Literal["adamw", "muon", "adamw8bit"] = "adamw"
    """Muon: on the matrices of the blocks, AdamW on the rest, at AdamW's learning rates (arXiv 2502.16982)."""
    lr: float = 2e-5
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled (AdamW), on matrices only: not on norms, biases and embeddings."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    momentum: float = 0.95
    """Of Muon."""
    ema: float = 0.0
    """Decay of a moving average of the weights, which is what is evaluated and exported; 0: none."""


@dataclass(frozen=True)
class DraftOptions(Section):
    """Heads that guess further tokens, for speculative decoding (arXiv 2401.10774); written to ``heads``."""

    heads: int = 0
    """Tokens after the next that are guessed; 0: none."""
    lr: float = 1e-3
    """Peak learning rate, of AdamW; schedule and the other settings are the model's."""
    frozen: bool = False
    """Train the heads alone."""


@dataclass(frozen=True)
class ScheduleOptions(Section):
    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """wsd: constant, then down by 1 - sqrt(x) over the last ``decay`` (arXiv 2404.06395, 2405.18392)."""
    warmup: float = 0.03
    """Below 1 a fraction of all steps, otherwise a number of steps."""
    decay: float = 0.2
    """Of wsd: below 1 a fraction of all steps, otherwise a number of steps."""
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
    async_save: bool = False
    """Write checkpoints beside the following steps: takes a copy of weights and optimizer state in memory."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several processes hold the model: each a copy, or each a part of every weight and of its state."""


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
    lora: LoraOptions = field(default_factory=LoraOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    stages: list[StageOptions] = field(default_factory=list)
    """Parts of the run with mixtures and learning rates of their own; instead of train.epochs and train.max_steps."""
    optim: OptimOptions = field(default_factory=OptimOptions)
    draft: DraftOptions = field(default_factory=DraftOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    log: LogOptions = field(default_factory=LogOptions)
    samples: SamplesOptions = field(default_factory=SamplesOptions)
    eval: EvalOptions = field(default_factory=EvalOptions)
