"""What a run would do, without doing it: its steps, how long they take at best, and the memory they need."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastsft.config import Config, ConfigError, load_config
from fastsft.data.prepare import Prepared, prepare
from fastsft.data.store import SampleStore
from fastsft.models.config import ModelConfig
from fastsft.models.decoder import Decoder
from fastsft.models.skeleton import skeleton
from fastsft.ops.objectives import OBJECTIVES
from fastsft.progress import Progress
from fastsft.train import schedule, start
from fastsft.train.curriculum import CurriculumStage
from fastsft.train.objective import check_objective, describe
from fastsft.train.stages import Stage, stages_of
from fastsft.train.throughput import Arithmetic, matmul_rate

_LOSS_SCRATCH = 256 << 20  # of ops.linear_cross_entropy, at most


@dataclass(frozen=True)
class StagePlan:
    """``exact`` is false where samples are chosen while the run goes on: easy ones left out, or a curriculum. The
    numbers are then those of all samples, or those of the first round carried on."""

    name: str
    exact: bool
    steps: int
    epochs: int
    samples: int
    tokens: int
    trained_tokens: int
    warmup_steps: int
    peak_rate: float
    last_rate: float
    flops: int


@dataclass(frozen=True)
class Plan:
    """``memory``: bytes by what they hold; ``seconds``: of the steps, were they nothing but matrix products at the rate
    that this machine has now; ``unusual``: what a second look should go to."""

    stages: tuple[StagePlan, ...]
    parameters: int
    trained_parameters: int
    dtype: str
    objective: str
    reduction: str
    tokens_per_step: int
    memory: dict[str, int]
    matmul_flops_per_second: float
    seconds: float
    tokens_per_second: float
    unusual: tuple[str, ...]
    first_batch: tuple[int, ...]
    """Numbers of the training samples of the first micro-batch."""
    prepared: Prepared

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        kept = {k: v for k, v in vars(self).items() if k not in ("prepared", "stages")}
        return {**kept, "stages": [vars(stage) for stage in self.stages], "data": self.prepared.report}


def make_plan(config: Config, *, progress: Progress | None = None) -> Plan:
    """Prepare the data of a run, which it will find again, and reckon the rest. No weights are read or made.

    Raises:
        ConfigError, DataError: input that cannot be used.
    """
    config = load_config(config)
    check_objective(config.objective)
    start.check_fits(config, start.architecture(config))
    start.check_reference(config)
    prepared = prepare(config, progress=progress)
    store = prepared.train
    model = _blank(config, prepared.tokenizer.vocab_size)
    arithmetic = Arithmetic.of(model)
    options = stages_of(config)
    stages = [(Stage if o.curriculum == "none" else CurriculumStage)(config, i, store) for i, o in enumerate(options)]
    first = next((stage.members(0) for stage in stages if stage.steps), None)
    if first is None:
        raise ConfigError("data: the weights and ratios of the sources leave no sample for any stage")
    trained_tokens = store.trained_counts()
    plans = tuple(_stage_plan(config, stage, store, trained_tokens, arithmetic) for stage in stages)
    rate = matmul_rate(getattr(torch, config.model.dtype))
    seconds = sum(p.flops for p in plans) / rate
    memory = memory_of(config, model, share=store.trained_tokens / max(store.num_tokens, 1))
    return Plan(
        plans,
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        config.model.dtype,
        config.objective.name,
        describe(config.objective),
        config.train.tokens_per_batch * config.train.accumulation,
        memory,
        rate,
        seconds,
        sum(p.tokens for p in plans) / seconds,
        tuple(_unusual(config, plans, prepared, memory)),
        tuple(first[0].tolist()),
        prepared,
    )


def _blank(config: Config, vocab_size: int) -> Decoder:
    """The model, adapted and without memory."""
    options = config.model
    architecture = (
        start.architecture(config)
        if options.path is not None
        else ModelConfig.from_hf({"vocab_size": vocab_size, **options.init}, "model.init")
    )
    with skeleton():
        model = Decoder(architecture)
    if config.lora.rank:
        start.adapt(model, config)
    return model


def _stage_plan(
    config: Config,
    stage: Stage | CurriculumStage,
    store: SampleStore,
    trained_tokens: npt.NDArray[np.int64],
    arithmetic: Arithmetic,
) -> StagePlan:
    exact = isinstance(stage, Stage) and not stage.options.drop_easy
    known = stage.steps if isinstance(stage, Stage) else min(stage.steps, stage.options.curriculum_steps)
    micro = list(itertools.chain.from_iterable(stage.members(step) for step in range(known)))
    members = np.concatenate(micro) if micro else np.zeros(0, np.int64)
    lengths, targets = store.lengths[members], int(trained_tokens[members].sum())
    scale = stage.steps / known if known else 0.0
    last = schedule.factor(config.schedule, stage.steps - 1, stage.steps) if stage.steps else 0.0
    return StagePlan(
        name=stage.options.name,
        exact=exact,
        steps=stage.steps,
        epochs=stage.options.epochs,
        samples=round(scale * len(members)),
        tokens=round(scale * int(lengths.sum())),
        trained_tokens=round(scale * targets),
        warmup_steps=schedule.warmup_steps(config.schedule, stage.steps),
        peak_rate=stage.rate,
        last_rate=stage.rate * last,
        flops=round(scale * arithmetic.flops(lengths, targets)),
    )


def memory_of(config: Config, model: Decoder, *, share: float) -> dict[str, int]:
    """Bytes of a step, by what they hold.

    Args:
        share: of the tokens that are trained on: the head's work is theirs alone.
    """
    size = getattr(torch, config.model.dtype).itemsize
    everything = sum(p.numel() for p in model.parameters())
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    count = sum(p.numel() for _, p in trained)
    hidden = sum(p.numel() for n, p in trained if p.ndim == 2 and n.startswith("layers."))
    wide = sum(p.numel() for n, p in trained if n.startswith(("embed_tokens", "lm_head")))
    summed = 4 if size < 4 and config.train.accumulation > 1 else 0
    moments = {"adamw": 8 * count, "muon": 8 * count - 4 * hidden, "adamw8bit": 8 * count - 6 * hidden}
    tokens, width = config.train.tokens_per_batch, model.config.hidden_size
    targets = round(share * tokens)
    per_token = activations_per_token(model.config)
    layers = model.config.num_hidden_layers
    kept = width * layers + per_token if config.train.activation_checkpointing else per_token * layers
    found = {
        "weights": size * everything,
        "gradients": 4 * wide + (size + summed) * (count - wide),
        "master weights": 4 * count if size < 4 else 0,
        "optimizer moments": moments[config.optim.kind],
        "averaged weights": 4 * count if config.optim.ema else 0,
        "activations": size * tokens * kept,
        "loss": min(_LOSS_SCRATCH, 4 * targets * model.config.vocab_size) + 8 * targets * width,
        "reference model": size * everything if OBJECTIVES[config.objective.name].needs == "reference" else 0,
    }
    if config.train.async_save:
        names = ("weights", "master weights", "optimizer moments", "averaged weights")
        found["copy for saving"] = sum(found[name] for name in names)
    return {name: size for name, size in found.items() if size}


def activations_per_token(config: ModelConfig) -> int:
    """Elements that one layer keeps of a token for the backward pass.

    Both norms' inputs and outputs; queries, keys, values and what attention gives; the MLP's gate, input and product.
    Norms of queries and keys keep these once more.
    """
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    normed = queries + keys if config.qk_norm else 0
    return 4 * config.hidden_size + 2 * queries + 2 * keys + normed + 3 * config.intermediate_size


def _unusual(config: Config, stages: tuple[StagePlan, ...], prepared: Prepared, memory: dict[str, int]) -> list[str]:
    found = []
    for stage in stages:
        where = f"stage {stage.name}: " if len(stages) > 1 else ""
        if not stage.steps:
            found.append(f"{where}no step: its sources have no sample")
        elif stage.warmup_steps >= stage.steps:
            found.append(f"{where}schedule.warmup takes all {stage.steps} steps: the rate never comes down")
        elif stage.steps < 10:
            found.append(f"{where}{stage.steps} steps in all: a smaller train.tokens_per_batch gives more")
        if config.model.path is not None and not config.lora.rank and stage.peak_rate > 2e-4:
            found.append(f"{where}a learning rate of {stage.peak_rate:g} is high for all weights of a trained model")
        if config.lora.rank and stage.peak_rate < 5e-5:
            found.append(f"{where}a learning rate of {stage.peak_rate:g} is low for adapters")
        filled = stage.tokens / max(stage.steps * config.train.tokens_per_batch * config.train.accumulation, 1)
        if stage.steps >= 10 and filled < 0.7:
            found.append(f"{where}batches are {filled:.0%} full: samples that do not fit together, or short epochs")
    report = prepared.report
    if not report["eval"]["samples"]:
        found.append("nothing is held out: there will be no held-out loss")
    share = report["train"]["trained_tokens"] / max(report["train"]["tokens"], 1)
    if share < 0.02:
        found.append(f"{share:.1%} of the tokens are trained on")
    if config.train.save_every == 0 or config.train.save_every > sum(s.steps for s in stages):
        found.append("the only checkpoint is that of the end: a run that is killed begins anew")
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if sum(memory.values()) > 0.9 * available:
        found.append(f"needs about {sum(memory.values()) / 2**30:.1f} GiB, this machine has {available / 2**30:.1f}")
    return found
