"""What the values of a configuration may be, beyond their types."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from fastsft.config.errors import ConfigError
from fastsft.config.run import Config


def check_ranges(config: Config, where: str) -> None:
    """Raises ConfigError for a value out of range; ``where`` names the file."""

    def check(ok: bool, name: str, expected: str, value: object) -> None:
        if not ok:
            raise ConfigError(f"{where}: {name}: expected {expected}, got {value!r}")

    m, d, o, s, t = config.model, config.data, config.optim, config.schedule, config.train
    if m.path is not None and m.init:
        raise ConfigError(f"{where}: model: give either path or init, not both")
    check(0 <= config.seed < 2**63, "seed", "an integer in [0, 2**63)", config.seed)
    if m.path is not None and config.tokenizer.train_vocab is not None:
        raise ConfigError(f"{where}: tokenizer.train_vocab: a model read from model.path keeps its own tokenizer")
    check(0 <= d.eval_fraction < 1, "data.eval_fraction", "a fraction in [0, 1)", d.eval_fraction)
    check(not (d.train and d.sources), "data.train", "nothing beside data.sources", d.train)
    names = [source.name for source in d.sources]
    check(len(set(names)) == len(names), "data.sources", "different names", names)
    for i, source in enumerate(d.sources):
        check(len(source.files) > 0, f"data.sources.{i}.files", "at least one file", source.files)
        check(0 <= source.weight < math.inf, f"data.sources.{i}.weight", "a finite number, at least 0", source.weight)
        check(source.cap is None or source.cap >= 1, f"data.sources.{i}.cap", "at least 1", source.cap)
    for name, limit in dataclasses.asdict(d.filters).items():
        if name.partition("_")[0] in ("min", "max") and limit is not None:
            check(limit >= 0, f"data.filters.{name}", "at least 0", limit)
    for tag, ratio in d.ratios.items():
        check(ratio > 0, f"data.ratios.{tag}", "more than 0", ratio)
    check(d.max_length >= 2, "data.max_length", "at least 2", d.max_length)
    check(0 <= d.max_bad <= 1, "data.max_bad", "a share in [0, 1]", d.max_bad)
    for name, value in dataclasses.asdict(d.weights).items():
        check(value >= 0, f"data.weights.{name}", "at least 0", value)
    for skill, value in d.skills.items():
        check(value > 0, f"data.skills.{skill}", "more than 0", value)
    check(0 < d.dedup.threshold <= 1, "data.dedup.threshold", "a similarity in (0, 1]", d.dedup.threshold)
    check(d.dedup.num_perm >= 1, "data.dedup.num_perm", "at least 1", d.dedup.num_perm)
    check(0 <= d.fim.rate <= 1, "data.fim.rate", "a probability", d.fim.rate)
    check(0 <= d.fim.spm_rate <= 1, "data.fim.spm_rate", "a probability", d.fim.spm_rate)
    check(len(set(d.fim.markers)) in (0, 3) and len(d.fim.markers) in (0, 3), "data.fim.markers",
          "three different tokens, or none", d.fim.markers)  # fmt: skip
    check(not d.fim.markers or d.fim.format == "auto", "data.fim.format", '"auto" beside data.fim.markers',
          d.fim.format)  # fmt: skip
    check(config.lora.rank >= 0, "lora.rank", "at least 0", config.lora.rank)
    check(config.lora.alpha > 0, "lora.alpha", "more than 0", config.lora.alpha)
    check(len(config.lora.targets) > 0, "lora.targets", "at least one name", config.lora.targets)
    j = config.objective
    check((j.constant is not None) == (j.reduction == "constant"), "objective.constant",
          'a number if, and only if, objective.reduction is "constant"', j.constant)  # fmt: skip
    check(j.constant is None or j.constant > 0, "objective.constant", "more than 0", j.constant)
    check(0 <= j.label_smoothing < 1, "objective.label_smoothing", "a value in [0, 1)", j.label_smoothing)
    for name in ("z_loss", "neftune"):
        check(getattr(j, name) >= 0, f"objective.{name}", "at least 0", getattr(j, name))
    check_stages(config, check)
    check(o.lr > 0, "optim.lr", "more than 0", o.lr)
    check(0 <= o.beta1 < 1, "optim.beta1", "a value in [0, 1)", o.beta1)
    check(0 <= o.beta2 < 1, "optim.beta2", "a value in [0, 1)", o.beta2)
    check(o.eps > 0, "optim.eps", "more than 0", o.eps)
    check(o.weight_decay >= 0, "optim.weight_decay", "at least 0", o.weight_decay)
    check(o.clip_norm >= 0, "optim.clip_norm", "at least 0", o.clip_norm)
    check(0 <= o.momentum < 1, "optim.momentum", "a value in [0, 1)", o.momentum)
    check(0 <= o.ema < 1, "optim.ema", "a value in [0, 1)", o.ema)
    a = config.draft
    check(a.heads >= 0, "draft.heads", "at least 0", a.heads)
    check(a.lr > 0, "draft.lr", "more than 0", a.lr)
    check(not (a.heads and t.parallel == "fsdp"), "draft.heads", '0 beside train.parallel = "fsdp"', a.heads)
    alone = a.heads > 0 and config.lora.rank == 0 and o.ema == 0 and o.kind == "adamw"
    check(
        not a.frozen or alone,
        "draft.frozen",
        "false without draft.heads, and beside lora, optim.ema and other kinds of optim",
        True,
    )
    for name in ("warmup", "decay"):
        value = getattr(s, name)
        whole = 0 <= value < 1 or value == int(value) > 0
        check(whole, f"schedule.{name}", "a fraction below 1, or a whole number of steps", value)
    check(0 <= s.final <= 1, "schedule.final", "a fraction in [0, 1]", s.final)
    check(t.tokens_per_batch >= d.max_length, "train.tokens_per_batch", f"at least data.max_length = {d.max_length}",
          t.tokens_per_batch)  # fmt: skip
    check(o.kind == "adamw" or t.parallel == "ddp", "optim.kind", '"adamw" beside train.parallel = "fsdp"', o.kind)
    check(not (t.async_save and t.parallel == "fsdp"), "train.async_save", 'false beside train.parallel = "fsdp"',
          t.async_save)  # fmt: skip
    for name in ("accumulation", "epochs", "keep"):
        check(getattr(t, name) >= 1, f"train.{name}", "at least 1", getattr(t, name))
    check(t.max_steps is None or t.max_steps >= 1, "train.max_steps", "at least 1", t.max_steps)
    for name in ("eval_every", "save_every"):
        check(getattr(t, name) >= 0, f"train.{name}", "at least 0", getattr(t, name))
    check_watching(config, check)


def check_watching(config: Config, check: Callable[[bool, str, str, object], None]) -> None:
    for section in ("samples", "eval"):
        options = getattr(config, section)
        check(options.every >= 0, f"{section}.every", "at least 0", options.every)
        check(options.max_tokens >= 1, f"{section}.max_tokens", "at least 1", options.max_tokens)
        check(options.temperature >= 0, f"{section}.temperature", "at least 0", options.temperature)
        check(options.seed >= 0, f"{section}.seed", "at least 0", options.seed)
    check(config.eval.n >= 1, "eval.n", "at least 1", config.eval.n)
    check(1 <= min(config.eval.k, default=0) <= max(config.eval.k, default=0) <= config.eval.n, "eval.k",
          f"numbers from 1 to eval.n = {config.eval.n}", config.eval.k)  # fmt: skip


def check_stages(config: Config, check: Callable[[bool, str, str, object], None]) -> None:
    stages, t = config.stages, config.train
    check(not stages or (t.epochs == 1 and t.max_steps is None), "stages",
          "train.epochs and train.max_steps unset beside them", {"epochs": t.epochs, "max_steps": t.max_steps}
    )  # fmt: skip
    names = [stage.name for stage in stages]
    check(len(set(names)) == len(names), "stages", "different names", names)
    known = [source.name for source in config.data.sources] or ["train"]
    for i, stage in enumerate(stages):
        check(stage.epochs >= 1, f"stages.{i}.epochs", "at least 1", stage.epochs)
        check(stage.max_steps is None or stage.max_steps >= 1, f"stages.{i}.max_steps", "at least 1", stage.max_steps)
        check(stage.lr is None or stage.lr > 0, f"stages.{i}.lr", "more than 0", stage.lr)
        check(0 <= stage.drop_easy < 1, f"stages.{i}.drop_easy", "a share in [0, 1)", stage.drop_easy)
        check(stage.curriculum == "none" or (stage.max_steps is not None and not stage.drop_easy),
              f"stages.{i}.curriculum", '"none" without max_steps or beside drop_easy', stage.curriculum)  # fmt: skip
        check(stage.curriculum_steps >= 1, f"stages.{i}.curriculum_steps", "at least 1", stage.curriculum_steps)
        for source, weight in stage.weights.items():
            check(source in known, f"stages.{i}.weights", f"names of data.sources: {', '.join(known)}", source)
            check(weight >= 0, f"stages.{i}.weights.{source}", "at least 0", weight)
        for tag, ratio in (stage.ratios or {}).items():
            check(ratio > 0, f"stages.{i}.ratios.{tag}", "more than 0", ratio)
