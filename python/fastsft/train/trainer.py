"""The training loop: packed batches in, a tuned Hugging Face folder out; exact, resumable, loud about what is wrong."""

from __future__ import annotations

import bisect
import math
import os
import shutil
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import safetensors.torch
import torch

from fastsft.config import Config, ConfigError, load_config, to_dict, to_json
from fastsft.data.batch import VarlenBatch
from fastsft.data.loader import PackedLoader
from fastsft.data.lock import hold
from fastsft.data.notices import notices
from fastsft.data.prepare import Prepared, prepare
from fastsft.models.decoder import Decoder
from fastsft.models.weights import load_model, save_model
from fastsft.progress import bars
from fastsft.train import checkpoint, schedule, start
from fastsft.train.evaluate import EvalResult, batch_loss, evaluate_loss
from fastsft.train.metrics import Display, MetricsLog
from fastsft.train.optim import MasterAdamW

# Settings that do not change the weights; every other difference to the checkpoint's configuration stops a resume.
_FREE = {"output", "train.eval_every", "train.save_every", "train.keep"}


class NonFiniteError(FloatingPointError):
    """A NaN or infinite loss or gradient. The weights are those before the step named in the message."""


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


class Trainer:
    """One run of one configuration in one process.

    Args:
        model, prepared: given by a caller that already has them; otherwise built from the configuration.

    Raises:
        ConfigError, DataError: input that cannot be used.
    """

    def __init__(
        self,
        config: Config,
        *,
        model: Decoder | None = None,
        prepared: Prepared | None = None,
        progress: bool = True,
    ) -> None:
        self.config = config = load_config(config)
        self.output = Path(config.output)
        start.check_fits(config, model.config if model else start.architecture(config))
        with bars(progress) as tell:
            self.prepared = prepared or prepare(config, progress=tell)
        self.model = model or start.build_model(config, vocab_size=self.prepared.tokenizer.vocab_size)
        self._origin = start.fingerprint(self.model)
        for store in (self.prepared.train, self.prepared.eval):
            if store.largest_id >= self.model.config.vocab_size:
                raise ConfigError(
                    f"tokenizer: expected ids below the model's vocab_size {self.model.config.vocab_size}, "
                    f"got {store.largest_id} in the data; is it the tokenizer of this model?"
                )
        self.model.activation_checkpointing = config.train.activation_checkpointing
        self.optimizer = MasterAdamW(self.model, config.optim)
        self.loader = PackedLoader(
            self.prepared.train, capacity=config.train.tokens_per_batch, seed=config.seed, weights=self.prepared.passes
        )
        self._first_steps = self._plan_epochs()
        self.total_steps = self._first_steps[-1]
        if config.train.max_steps is not None:
            self.total_steps = min(self.total_steps, config.train.max_steps)
        self._progress = progress
        self._signal: int | None = None

    def run(self) -> TrainResult:
        """Train to the end, from the newest valid checkpoint if there is one.

        Raises:
            ConfigError: another process works in the output folder, or its checkpoints are of another run.
            NonFiniteError: a NaN or infinite loss or gradient.
            SystemExit: SIGINT or SIGTERM came; the step it came in is finished and saved.
        """
        with hold(self.output):
            return self._run()

    def _run(self) -> TrainResult:
        warnings: list[str] = []
        found = checkpoint.latest(self.output / "checkpoints", warnings.append)
        first = found.step if found else 0
        before, loss = self._restore(found) if found else (None, math.nan)  # before any file is written: it may refuse
        checkpoint.write_file(self.output / "config.json", to_json(self.config))
        display = Display(self.total_steps, first, enabled=self._progress)
        for warning in warnings:
            display.note(f"warning: {warning}")
        for line in notices(self.prepared.report):
            display.note(line)
        display.note(self._plan())
        log = MetricsLog(self.output / "metrics.jsonl", resumed_step=first)
        previous = self._catch_signals()
        try:
            if found:
                display.note(f"resumed from {found.path}")
            else:
                before = self._evaluate(0, log, display)
            return self._steps(first, before, loss, log, display)
        finally:
            self._release_signals(previous)
            display.close()
            log.close()

    def _plan(self) -> str:
        batch = self.config.train.tokens_per_batch * self.config.train.accumulation
        parameters = sum(p.numel() for p in self.model.parameters())
        return (
            f"{parameters / 1e6:,.1f} M parameters, {self.config.model.dtype}, "
            f"{torch.get_num_threads()} threads; {len(self.prepared.train):,} samples, {self.total_steps:,} steps of "
            f"up to {batch:,} tokens"
        )

    def _steps(
        self, first: int, before: EvalResult | None, loss: float, log: MetricsLog, display: Display
    ) -> TrainResult:
        options = self.config.train
        after, tokens, seconds = before, 0, 0.0
        for step in range(first, self.total_steps):
            began = time.perf_counter()
            batches = self._batches(step)
            rate = self.config.optim.lr * schedule.factor(self.config.schedule, step, self.total_steps)
            loss, norm = self._update(step, batches, rate)
            took = time.perf_counter() - began
            count = sum(b.num_tokens for b in batches)
            tokens, seconds = tokens + count, seconds + took
            log.write(
                "step", step + 1, epoch=self._locate(step)[0], loss=loss, lr=rate, grad_norm=norm, tokens=count,
                trained_tokens=sum(int((b.weights > 0).sum()) for b in batches), seconds=took,
                tokens_per_second=count / took,
            )  # fmt: skip
            display.update(step + 1, loss, tokens / seconds)
            done = step + 1
            last = done == self.total_steps
            if (options.eval_every and done % options.eval_every == 0) or last:
                after = self._evaluate(done, log, display)
            if (options.save_every and done % options.save_every == 0) or last or self._signal is not None:
                self._save(done, before, loss)
            if self._signal is not None and not last:
                display.note(f"signal {self._signal}: saved step {done} in {self.output / 'checkpoints'}")
                raise SystemExit(128 + self._signal)
        if first == self.total_steps:  # resumed from the last step: the log has its evaluation, the export is missing
            after = self._evaluate(self.total_steps, None, display)
        speed = tokens / seconds if seconds else None
        return TrainResult(
            self.total_steps, self._export(), loss, before, after, speed, first, dict(self.prepared.report)
        )

    def _plan_epochs(self) -> list[int]:
        """The first step of each epoch that will be entered, and the step after the last."""
        options = self.config.train
        firsts = [0]
        for epoch in range(options.epochs):
            firsts.append(firsts[-1] + math.ceil(self.loader.num_batches(epoch) / options.accumulation))
            if options.max_steps is not None and firsts[-1] >= options.max_steps:
                break
        return firsts

    def _locate(self, step: int) -> tuple[int, int]:
        """(epoch, step within it)."""
        epoch = bisect.bisect_right(self._first_steps, step) - 1
        return epoch, step - self._first_steps[epoch]

    def _batches(self, step: int) -> list[VarlenBatch]:
        """The micro-batches of a step; an epoch's last step may have fewer than ``accumulation``."""
        epoch, within = self._locate(step)
        first = within * self.config.train.accumulation
        end = min(first + self.config.train.accumulation, self.loader.num_batches(epoch))
        return [self.loader.batch(epoch, i) for i in range(first, end)]

    def _update(self, step: int, batches: list[VarlenBatch], rate: float) -> tuple[float, float]:
        """One optimizer step; the loss is divided by the weight of all its micro-batches together."""
        weight = sum(float(b.weights.sum(dtype=torch.float64)) for b in batches)
        total = 0.0
        for batch in batches:
            loss = batch_loss(self.model, batch, normalizer=weight)
            value = float(loss.detach())
            if not math.isfinite(value):
                self._stop(step, [batch], f"loss is {value}")
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.collect()
            total += value
        norm = self.optimizer.grad_norm()
        if not math.isfinite(float(norm)):
            self._stop(step, batches, f"gradient norm is {float(norm)}")
        self.optimizer.step(rate, norm)
        return total, float(norm)

    def _stop(self, step: int, batches: list[VarlenBatch], what: str) -> None:
        self.optimizer.zero_grad()
        sources = [s for b in batches for s in b.sources]
        shown = ", ".join(sources[:20]) + (f" and {len(sources) - 20} more" if len(sources) > 20 else "")
        raise NonFiniteError(
            f"step {step + 1}: {what}; stopped before the update. Samples of the batch: {shown}. "
            f"Checkpoints: {self.output / 'checkpoints'}"
        )

    def _evaluate(self, step: int, log: MetricsLog | None, display: Display) -> EvalResult | None:
        result = evaluate_loss(self.model, self.prepared.eval, capacity=self.config.train.tokens_per_batch)
        if result is not None:
            if log is not None:
                log.write("eval", step, loss=result.loss, tokens=result.tokens)
            display.note(f"step {step}: held-out loss {result.loss:.4f} (perplexity {result.perplexity:.2f})")
        return result

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _save(self, step: int, before: EvalResult | None, loss: float) -> None:
        state = {
            "step": step,
            "config": to_dict(self.config),
            "origin": self._origin,
            "data": self.prepared.report.get("key"),
            "reduction": "sum of token weight times loss over the step, divided by the summed token weight",
            "train_loss": loss,
            "eval_before": None if before is None else {"loss": before.loss, "tokens": before.tokens},
        }

        def fill(folder: Path) -> None:
            self._write_model(folder / "model")
            safetensors.torch.save_file(self.optimizer.state(), folder / "optimizer.safetensors")

        checkpoint.write(self.output / "checkpoints", step, state, fill, keep=self.config.train.keep)

    def _restore(self, found: checkpoint.Checkpoint) -> tuple[EvalResult | None, float]:
        """Put the checkpoint's state in place; the loss before the first step, and that of the last one made."""
        changed = sorted(_differences(found.state["config"], to_dict(self.config)))
        if found.state["data"] != self.prepared.report.get("key"):
            changed.append("the data")
        if found.state.get("origin") != self._origin:
            changed.append("the model it started from (weights or config.json)")
        if changed:
            raise ConfigError(
                f"{found.path} was written with other settings: {', '.join(changed)}. "
                "Restore them, or choose another output folder"
            )
        saved = load_model(found.path / "model", dtype=next(self.model.parameters()).dtype)
        self.model.load_state_dict(saved.state_dict())
        self.optimizer.load_state(safetensors.torch.load_file(found.path / "optimizer.safetensors"))
        before = found.state["eval_before"]
        return EvalResult(**before) if before else None, found.state["train_loss"]

    def _export(self) -> Path:
        target = self.output / "model"
        stage = self.output / f".model.tmp-{os.getpid()}"
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()  # so that everything temporary lies inside it
        self._write_model(stage)
        checkpoint.replace_folder(stage, target)
        return target

    def _write_model(self, folder: Path) -> None:
        save_model(self.model, folder)
        self.prepared.tokenizer.save(folder)

    # --- signals ----------------------------------------------------------------------------------------------------

    def _catch_signals(self) -> dict[int, Any]:
        """SIGTERM and SIGINT finish the step, save and exit with 128 + signal; a second one acts at once."""
        if threading.current_thread() is not threading.main_thread():
            return {}

        def note(number: int, frame: FrameType | None) -> None:
            self._signal = number
            if self._progress:  # not through the display: it may be what was interrupted
                os.write(2, b"\nfinishing the step and saving it; once more to stop at once\n")
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)

        return {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}

    @staticmethod
    def _release_signals(previous: dict[int, Any]) -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> set[str]:
    """Dotted names of the settings that differ and that can change the result."""
    names: set[str] = set()
    for key in old.keys() | new.keys():
        name = f"{prefix}{key}"
        a, b = old.get(key), new.get(key)
        if name in _FREE or a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict) and name != "model.init":
            names |= _differences(a, b, f"{name}.")
        else:
            names.add(name)
    return names
