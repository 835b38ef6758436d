"""Samples of tasks, drawn and judged: what is finished is on disk, and is never drawn again."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson
import torch

from fastsft.data.lock import hold
from fastsft.engine.llm import LLM
from fastsft.engine.request import PromptError, RequestOutput, SamplingParams
from fastsft.progress import Progress
from fastsft.synthesis.journal import check_plan, digest_model, digest_tasks, read_whole
from fastsft.verify.answers import ask, code_of
from fastsft.verify.judge import check_workers, failure_kind, judge, last_words
from fastsft.verify.languages import Language
from fastsft.verify.sandbox import Limits
from fastsft.verify.tasks import Task

_SAMPLES = "samples.jsonl"
# Sequences of one call of the engine: what a killed run has to draw again at most.
_GROUP = 256


@dataclass(frozen=True)
class DrawOptions:
    """What determines the samples, besides the model and the tasks."""

    n: int = 8
    temperature: float = 0.8
    top_p: float = 1.0
    max_tokens: int = 512
    seed: int = 0
    completion: bool = False
    """Continue the prompt as it is, instead of answering it as a chat message."""
    stop: tuple[str, ...] = ()
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and cache."""
    seconds: float = 5.0
    """Time that one run of a sample may take."""
    device: str = "cpu"
    """Where samples are drawn: "cpu", or "cuda"."""


@dataclass(frozen=True)
class Sample:
    """``finished``: it ended by itself, not at ``max_tokens``. ``logprob``: the sum over its tokens under the model's
    own distribution, in nats. ``failure``: None if it passed, otherwise how it failed; ``said``: its last words
    then."""

    text: str
    tokens: int
    finished: bool
    logprob: float
    failure: str | None
    said: str = ""


@dataclass(frozen=True)
class Drawn:
    """The samples of one task; none of them if there is a ``problem`` with its prompt."""

    task_id: str | int
    samples: tuple[Sample, ...]
    problem: str | None = None

    @property
    def passed(self) -> int:
        return sum(s.failure is None for s in self.samples)

    @property
    def pass_rate(self) -> float:
        return self.passed / len(self.samples) if self.samples else 0.0


def draw(
    model: str | os.PathLike[str],
    tasks: Sequence[Task],
    folder: str | os.PathLike[str],
    options: DrawOptions,
    *,
    workers: int = 2,
    languages: Mapping[str, Language] | None = None,
    speculative_config: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> list[Drawn]:
    """Draw ``options.n`` samples for each task and execute them in the sandbox.

    Sample i of a task is a function of (seed, task_id, i), the model and the prompt. Finished tasks are in ``folder``:
    the same call after a kill goes on where it was, and ends with the same file.

    Args:
        model: a model folder.
        tasks: with different ids.
        folder: ``plan.json`` says what was asked for, ``samples.jsonl`` has one line per task.
        workers: samples executed at once.
        languages: as for :func:`fastsft.verify.judge.judge`.
        speculative_config: as for :class:`fastsft.LLM`. The samples are the same.

    Returns:
        One result per task, in order.

    Raises:
        ConfigError: another process works in ``folder``. ValueError: two tasks with one id, an option out of range,
            drafts whose acceptance changes samples, or ``folder`` has samples that were drawn with another model, other
            tasks or other options. RuntimeError: the sandbox cannot be set up.
    """
    check_workers(workers)
    ids = [task.task_id for task in tasks]
    if len(set(ids)) != len(ids):
        twice = next(i for n, i in enumerate(ids) if i in ids[:n])
        raise ValueError(f"tasks: expected different task_ids, got {twice!r} twice")
    if speculative_config and speculative_config.get("acceptance") == "rejection":
        raise ValueError("speculative_config: acceptance: expected 'noise', which changes no sample, got 'rejection'")
    size = max(1, _GROUP // _params(options, "").n)
    place = Path(folder)
    with hold(place):
        plan = {"model": digest_model(Path(model)), "tasks": digest_tasks(tasks, languages),
                "options": dataclasses.asdict(options)}  # fmt: skip
        check_plan(place, plan, "samples that were drawn")
        drawn = [_drawn(row) for row in read_whole(place / _SAMPLES, ids, size)]
        if len(drawn) < len(tasks):
            judged = {"workers": workers, "languages": languages}
            llm = LLM(model, dtype=getattr(torch, options.dtype), device=options.device,
                      speculative_config=speculative_config)  # fmt: skip
            with open(place / _SAMPLES, "ab") as stream:
                for begin in range(len(drawn), len(tasks), size):
                    if progress:
                        progress("tasks sampled", begin, len(tasks))
                    found = _draw_group(llm, tasks[begin : begin + size], options, judged, progress)
                    stream.write(b"".join(orjson.dumps(dataclasses.asdict(d)) + b"\n" for d in found))
                    stream.flush()
                    os.fsync(stream.fileno())
                    drawn += found
        if progress:
            progress("tasks sampled", len(tasks), len(tasks))
    return drawn


def _draw_group(
    llm: LLM, tasks: Sequence[Task], options: DrawOptions, judged: dict[str, Any], progress: Progress | None
) -> list[Drawn]:
    outputs: dict[str | int, RequestOutput] = {}
    problems: dict[str | int, str] = {}
    fit = list(tasks)
    while fit and not outputs:
        try:
            generated = _generate(llm, fit, options, progress)
            outputs = {task.task_id: output for task, output in zip(fit, generated, strict=True)}
        except PromptError as error:  # too long, say: the other tasks can do nothing about it
            problems[fit[error.number].task_id] = error.problem
            del fit[error.number]
    pairs = [(t, code_of(o.text, completion=options.completion)) for t in fit for o in outputs[t.task_id].outputs]
    told = None if progress is None else lambda done, total: progress("executed", done, total)
    results = judge(pairs, **judged, limits=Limits(seconds=options.seconds), progress=told)
    failures = iter([(None if r.status == "ok" else failure_kind(r), last_words(r)) for r in results])
    drawn = []
    for task in tasks:
        samples = [
            Sample(o.text, len(o.token_ids), o.finish_reason == "stop", _logprob(o), *next(failures))
            for o in (outputs[task.task_id].outputs if task.task_id in outputs else ())
        ]
        drawn.append(Drawn(task.task_id, tuple(samples), problems.get(task.task_id)))
    return drawn


def _generate(llm: LLM, tasks: Sequence[Task], options: DrawOptions, progress: Progress | None) -> list[RequestOutput]:
    params = [_params(options, task.task_id) for task in tasks]
    told: Any = False if progress is None else lambda done, total: progress("generated", done, total)
    return ask(llm, tasks, params, completion=options.completion, progress=told)


def _params(options: DrawOptions, task_id: str | int) -> SamplingParams:
    # Continuation i draws with seed + i. 61 bits leave room for the sum, and no two tasks are likely to overlap.
    digest = hashlib.blake2b(f"{options.seed}\0{task_id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return SamplingParams(
        n=options.n, temperature=options.temperature, top_p=options.top_p, max_tokens=options.max_tokens,
        stop=options.stop, seed=int.from_bytes(digest, "little") >> 3, logprobs=0,
    )  # fmt: skip


def _logprob(output: Any) -> float:
    return math.fsum(at[token] for at, token in zip(output.logprobs, output.token_ids, strict=True))


def _drawn(row: dict[str, Any]) -> Drawn:
    return Drawn(row["task_id"], tuple(Sample(**s) for s in row["samples"]), row["problem"])
