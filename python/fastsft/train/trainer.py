"""A run from its configuration to a tuned Hugging Face folder: exact, resumable, loud about what is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastsft.config import Config, ConfigError, load_config, to_dict, to_json
from fastsft.data.lock import hold
from fastsft.data.mixture import sources_of
from fastsft.data.notices import notices
from fastsft.data.prepare import Prepared, prepare
from fastsft.models.decoder import Decoder
from fastsft.ops.objectives import OBJECTIVES
from fastsft.progress import bars
from fastsft.train import checkpoint, resume, schedule, start
from fastsft.train.about import write_about
from fastsft.train.distributed import World
from fastsft.train.draft import DraftTraining
from fastsft.train.ema import Ema
from fastsft.train.evaluate import EvalResult, evaluate_loss
from fastsft.train.live import Live
from fastsft.train.losses import SEGMENTS, by_origin, by_segment, means
from fastsft.train.metrics import Display, MetricsLog, NoLog, read_metrics
from fastsft.train.objective import Objective, check_objective, describe
from fastsft.train.optim import make_optimizer
from fastsft.train.reference import Reference, open_reference
from fastsft.train.result import Progress, TrainResult
from fastsft.train.selfcheck import check_packing
from fastsft.train.settling import settling
from fastsft.train.signals import Signals
from fastsft.train.stage_list import StageList
from fastsft.train.state import TrainingState, copied
from fastsft.train.throughput import Arithmetic, matmul_rate
from fastsft.train.trackers import Trackers, check_trackers
from fastsft.train.update import NonFiniteError, Update
from fastsft.train.watch import Watch

__all__ = ["NonFiniteError", "TrainResult", "Trainer"]


class Trainer:
    """One run of one configuration.

    Args:
        model, prepared: given by a caller that already has them; otherwise built from the configuration.
        world: the processes that share the run, each with a trainer of its own; see ``distributed.joined``.

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
        world: World | None = None,
    ) -> None:
        self.config = config = load_config(config)
        self.output = Path(config.output)
        self.world = world or World()
        start.check_processes(config, self.world)
        self._progress = progress = progress and self.world.is_main
        check_objective(config.objective)
        check_trackers(config.log)
        self._live = Live(config)
        start.check_fits(config, model.config if model else start.architecture(config))
        start.check_reference(config)
        with bars(progress) as tell:
            self.prepared = prepared or self.world.main_first(lambda: prepare(config, progress=tell))
        self.model = model or start.build_model(config, vocab_size=self.prepared.tokenizer.vocab_size)
        self._origin = start.fingerprint(self.model)
        for store in (self.prepared.train, self.prepared.eval):
            if store.largest_id >= self.model.config.vocab_size:
                raise ConfigError(
                    f"tokenizer: expected ids below the model's vocab_size {self.model.config.vocab_size}, "
                    f"got {store.largest_id} in the data; is it the tokenizer of this model?"
                )
        if config.lora.rank:
            start.adapt(self.model, config)
        if config.draft.frozen:
            self.model.requires_grad_(False)
        self.model.activation_checkpointing = config.train.activation_checkpointing
        # Copied while it is what the run found, and in one piece.
        self._needs = OBJECTIVES[config.objective.name].needs
        own = self._needs == "reference" and config.objective.reference is None
        self._policy = copied(self.model) if own else None
        self.parallel = start.spread(self.model, config, self.world)
        self.optimizer = make_optimizer(self.parallel.parameters, config.optim)
        self.average = Ema(self.optimizer, config.optim.ema) if config.optim.ema else None
        self.draft = DraftTraining(self.model, config) if config.draft.heads else None
        self._state = TrainingState(
            self.model, self.parallel, self.optimizer, self.average, self.draft, tokenizer=self.prepared.tokenizer,
            base=config.model.path,
        )  # fmt: skip
        self.stages = StageList(config, self.prepared.train, self.parallel)
        self._sources = [source.name for source in sources_of(config.data)]

    @property
    def total_steps(self) -> int:
        return self.stages.total_steps

    def run(self) -> TrainResult:
        """Train to the end, from the newest valid checkpoint if there is one.

        Raises:
            ConfigError: another process works in the output folder, or its checkpoints are of another run.
            NonFiniteError: a NaN or infinite loss or gradient.
            SystemExit: SIGINT or SIGTERM came; the step it came in is finished and saved.
        """
        with contextlib.ExitStack() as held:
            self.world.from_main(lambda: held.enter_context(hold(self.output)))
            return self._run()

    def _run(self) -> TrainResult:
        warnings: list[str] = []
        found = self.world.from_main(lambda: self._open(warnings.append))
        objective = Objective(self.config.objective, self._reference())
        self._update = Update(
            self.model, self.optimizer, objective, seed=self.config.seed, parallel=self.parallel, draft=self.draft
        )
        progress = Progress()
        if found:
            self._state.restore(found.path)
            progress = Progress.of(found)
        with contextlib.ExitStack() as ends:
            log: MetricsLog = NoLog()
            if self.world.is_main:
                trackers = Trackers(self.config.log, self.output, to_dict(self.config), resumed_step=progress.step)
                log = MetricsLog(self.output / "metrics.jsonl", resumed_step=progress.step, trackers=trackers)
            ends.callback(log.close)
            display = Display(self.total_steps, progress.step, enabled=self._progress)
            ends.callback(display.close)
            for warning in warnings:
                display.note(f"warning: {warning}")
            for line in notices(self.prepared.report):
                display.note(line)
            display.note(self._plan())
            watch = Watch(self.world.from_main(lambda: read_metrics(self.output / "metrics.jsonl")))
            options = self.config.train
            self._checkpoints = checkpoint.Writer(
                self.output / "checkpoints", keep=options.keep, background=options.async_save,
                world=self.world if self.parallel.sharded else World(),
            )  # fmt: skip
            ends.callback(self._checkpoints.close)
            signals = ends.enter_context(Signals(announce=self._progress))
            if found:
                display.note(f"resumed from {found.path}")
            else:
                self._self_check()
                progress.before = self._evaluate(0, log, display)
                self._show(0, log, display, last=False)
            self._rate = sum(self.world.gather(matmul_rate(self.parallel.dtype)))
            about = functools.partial(
                write_about, self.output / "about.json", model=self.model, total_steps=self.total_steps,
                plan=self._plan(), rate=self._rate, data=self.prepared.report,
            )  # fmt: skip
            self.world.from_main(about)
            settle = ends.enter_context(settling())
            return self._steps(progress, signals, log, display, watch, settle)

    def _open(self, warn: Callable[[str], None]) -> checkpoint.Checkpoint | None:
        """The checkpoint that the run goes on from."""
        found = checkpoint.latest(self.output / "checkpoints", warn)
        if found:  # before any file is written
            resume.refuse_changes(
                found, to_dict(self.config), data=self.prepared.report.get("key"), origin=self._origin
            )
        checkpoint.write_file(self.output / "config.json", to_json(self.config))
        return found

    def _plan(self) -> str:
        batches = self.stages[0].batches(0)
        batch = self.config.train.tokens_per_batch * self.config.train.accumulation
        parameters = sum(p.numel() for p in self.model.parameters())
        trained = sum(p.numel() for _, p in self.parallel.named())
        spread = "" if self.world.size == 1 else f"{self.world.size} processes ({self.config.train.parallel}), "
        part = "" if trained == parameters else f" ({trained / 1e6:,.2f} M trained)"
        return (
            f"{parameters / 1e6:,.1f} M parameters{part}, {self.config.model.dtype}, "
            f"{spread}{torch.get_num_threads()} threads; {len(self.prepared.train):,} samples, "
            f"{self.total_steps:,} steps of up to {batch:,} tokens; {self._update.objective.describe(batches)}"
        )

    def _steps(
        self,
        progress: Progress,
        signals: Signals,
        log: MetricsLog,
        display: Display,
        watch: Watch,
        settle: Callable[[], None],
    ) -> TrainResult:
        options, arithmetic = self.config.train, Arithmetic.of(self.model)
        first, after, tokens, flops, seconds = progress.step, progress.before, 0, 0, 0.0
        for stage, within in self.stages.remaining(progress, display):
            began = time.perf_counter()
            batches = stage.batches(within)
            read = time.perf_counter()
            factor = schedule.factor(self.config.schedule, within, stage.steps)
            rate = stage.rate * factor
            try:
                result = self._update(progress.step, batches, rate, self.config.draft.lr * factor)
            except NonFiniteError as error:
                raise NonFiniteError(f"{error}. Checkpoints: {self.output / 'checkpoints'}") from None
            if self.average:
                self.average.update()
            ended = time.perf_counter()
            took = ended - began
            phases = {
                "data": read - began,
                "forward_backward": ended - read - result.optimizer_seconds,
                "optimizer": result.optimizer_seconds,
            }
            needed, count = arithmetic.flops_of(batches), sum(b.num_tokens for b in batches)
            tokens, flops, seconds = tokens + count, flops + needed, seconds + took
            origins = by_origin(result.groups)
            stage.observe(within, origins)
            progress.step += 1
            progress.loss = result.loss
            log.write(
                "step", progress.step, stage=stage.options.name, epoch=stage.epoch(within), loss=result.loss,
                lr=rate, grad_norm=result.grad_norm, tokens=count,
                trained_tokens=sum(int((b.weights != 0).sum()) for b in batches),
                sources=means(origins, self._sources), segments=means(by_segment(result.groups), SEGMENTS),
                seconds=took, tokens_per_second=count / took, phases=phases, mfu=needed / took / self._rate,
                **({"draft_losses": list(result.draft_losses)} if self.draft else {}),
            )  # fmt: skip
            display.update(progress.step, result.loss, tokens / seconds, flops / seconds / self._rate)
            for spike in watch.see(result.loss, result.grad_norm, [s for b in batches for s in b.sources]):
                log.write("signal", progress.step, **dataclasses.asdict(spike))
                display.note(f"step {progress.step}: {spike.describe()}")
            if progress.step == first + 1:
                settle()
            last = within + 1 == stage.steps  # of its stage
            if (options.eval_every and progress.step % options.eval_every == 0) or last:
                after = self._evaluate(progress.step, log, display)
            signal = next(filter(None, self.world.gather(signals.number)), None)  # all stop at the same step
            if signal is None:  # otherwise what matters is to save at once
                self._show(progress.step, log, display, last=progress.step == self.total_steps)
            if (options.save_every and progress.step % options.save_every == 0) or last or signal is not None:
                self._save(progress, log)
            if signal is not None and progress.step < self.total_steps:
                self._checkpoints.wait()
                display.note(f"signal {signal}: saved step {progress.step} in {self.output / 'checkpoints'}")
                raise SystemExit(128 + signal)
        if first == self.total_steps:  # resumed from the last step: the log has its evaluation, the export is missing
            after = self._evaluate(self.total_steps, None, display)
        self._checkpoints.wait()
        speed = tokens / seconds if seconds else None
        return TrainResult(
            self.total_steps, self._state.export(self.output), progress.loss, progress.before, after, speed, first,
            dict(self.prepared.report), watch.early(self.total_steps),
        )  # fmt: skip

    def _evaluate(self, step: int, log: MetricsLog | None, display: Display) -> EvalResult | None:
        began = time.perf_counter()
        with self._state.averaged():
            result = evaluate_loss(
                self.model, self.prepared.eval, capacity=self.config.train.tokens_per_batch,
                # Rows of files of their own are of no source.
                sources=() if self.config.data.eval else self._sources, parallel=self.parallel,
            )  # fmt: skip
        if result is not None:
            if log is not None:
                log.write("eval", step, **dataclasses.asdict(result), seconds=time.perf_counter() - began)
            display.note(f"step {step}: held-out loss {result.loss:.4f} (perplexity {result.perplexity:.2f})")
        return result

    def _show(self, step: int, log: MetricsLog, display: Display, *, last: bool) -> None:
        """Samples and solved tasks, if they are due."""
        if not self._live.is_due(step, last=last):
            return
        with self._state.averaged():
            model = self.parallel.whole()
            draw = functools.partial(self._live, model, self.prepared.tokenizer, step, last=last)
            self.world.from_main(lambda: draw(write=log.write, note=display.note))

    def _reference(self) -> Reference | None:
        """What the objective compares with; called while the model is still what the run found."""
        if self._policy is not None:
            return Reference(model=self._policy)
        if not self._needs:
            return None
        with bars(self._progress) as tell:
            return open_reference(
                self.config, self.parallel, self.prepared.train, folder=self.output / "data", origin=self._origin,
                data=self.prepared.report["key"], progress=functools.partial(tell, "reference log-probabilities"),
            )  # fmt: skip

    def _self_check(self) -> None:
        """On samples of the first batch: documents that share a batch do not see each other."""
        if self.config.draft.frozen:  # it compares gradients
            return
        members = self.stages[0].members(0)[0]
        check_packing(self.model, self._update.objective, self.prepared.train, members, self.parallel)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _save(self, progress: Progress, log: MetricsLog) -> None:
        began = time.perf_counter()
        progress.stage = self.stages[len(progress.begun) - 1].state()
        state = progress.state() | {
            "config": to_dict(self.config),
            "origin": self._origin,
            "data": self.prepared.report.get("key"),
            "reduction": describe(self.config.objective),
        }
        if self.world.is_main or self.parallel.sharded:
            self._checkpoints.write(progress.step, state, self._state.writer(background=self.config.train.async_save))
            log.write("save", progress.step, seconds=time.perf_counter() - began)
