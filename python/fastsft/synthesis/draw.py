"""Samples of tasks, drawn and judged: what is finished is on disk, and is never drawn again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson
import torch

from fastsft.data.lock import hold
from fastsft.engine.llm import LLM
from fastsft.engine.request import PromptError, RequestOutput, SamplingParams
from fastsft.files import sync
from fastsft.models.tokenizer import FILES
from fastsft.verify.answers import ask, code_of
from fastsft.verify.judge import failure_kind, judge
from fastsft.verify.sandbox import Limits
from fastsft.verify.tasks import Task

Progress = Callable[[str, int, int], None]  # stage, done, total

_PLAN, _SAMPLES = "plan.json", "samples.jsonl"
# Sequences of one call of the engine. The work is cut at fixed places, whatever was done before: what is beside a
# sequence in a batch can change the last bits of its logits, and so, rarely, a draw.
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


@dataclass(frozen=True)
class Sample:
    """``finished``: it ended by itself, not at ``max_tokens``. ``logprob``: the sum over its tokens under the model's
    own distribution, in nats. ``failure``: None if it passed, otherwise how it failed."""

    text: str
    tokens: int
    finished: bool
    logprob: float
    failure: str | None


@dataclass(frozen=True)
class Drawn:
    """The samples of one task; none of them if there is a ``problem`` with its prompt."""

    task_id: str
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

    Returns:
        One result per task, in order.

    Raises:
        ConfigError: another process works in ``folder``. ValueError: two tasks with one id, an option out of range, or
            ``folder`` has samples that were drawn with another model, other tasks or other options. RuntimeError: the
            sandbox cannot be set up.
    """
    ids = [task.task_id for task in tasks]
    if len(set(ids)) != len(ids):
        twice = next(i for n, i in enumerate(ids) if i in ids[:n])
        raise ValueError(f"tasks: expected different task_ids, got {twice!r} twice")
    size = max(1, _GROUP // _params(options, "").n)
    place = Path(folder)
    with hold(place):
        _check_plan(place, {"model": _digest_model(Path(model)), "tasks": _digest_tasks(tasks),
                            "options": dataclasses.asdict(options)})  # fmt: skip
        drawn = _read(place / _SAMPLES, ids, size)
        if len(drawn) < len(tasks):
            llm = LLM(model, dtype=getattr(torch, options.dtype))
            with open(place / _SAMPLES, "ab") as stream:
                for begin in range(len(drawn), len(tasks), size):
                    if progress:
                        progress("tasks sampled", begin, len(tasks))
                    found = _draw_group(llm, tasks[begin : begin + size], options, workers, progress)
                    stream.write(b"".join(orjson.dumps(dataclasses.asdict(d)) + b"\n" for d in found))
                    stream.flush()
                    os.fsync(stream.fileno())
                    drawn += found
        if progress:
            progress("tasks sampled", len(tasks), len(tasks))
    return drawn


def _draw_group(
    llm: LLM, tasks: Sequence[Task], options: DrawOptions, workers: int, progress: Progress | None
) -> list[Drawn]:
    outputs: dict[str, RequestOutput] = {}
    problems: dict[str, str] = {}
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
    results = judge(pairs, workers=workers, limits=Limits(seconds=options.seconds), progress=told)
    failures = iter([None if r.status == "ok" else failure_kind(r) for r in results])
    drawn = []
    for task in tasks:
        samples = [
            Sample(o.text, len(o.token_ids), o.finish_reason == "stop", _logprob(o), next(failures))
            for o in (outputs[task.task_id].outputs if task.task_id in outputs else ())
        ]
        drawn.append(Drawn(task.task_id, tuple(samples), problems.get(task.task_id)))
    return drawn


def _generate(llm: LLM, tasks: Sequence[Task], options: DrawOptions, progress: Progress | None) -> list[RequestOutput]:
    params = [_params(options, task.task_id) for task in tasks]
    told: Any = False if progress is None else lambda done, total: progress("generated", done, total)
    return ask(llm, tasks, params, completion=options.completion, progress=told)


def _params(options: DrawOptions, task_id: str) -> SamplingParams:
    # Continuation i draws with seed + i. 61 bits leave room for the sum, and no two tasks are likely to overlap.
    digest = hashlib.blake2b(f"{options.seed}\0{task_id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return SamplingParams(
        n=options.n, temperature=options.temperature, top_p=options.top_p, max_tokens=options.max_tokens,
        stop=options.stop, seed=int.from_bytes(digest, "little") >> 3, logprobs=0,
    )  # fmt: skip


def _logprob(output: Any) -> float:
    return math.fsum(at[token] for at, token in zip(output.logprobs, output.token_ids, strict=True))


# --- what is on disk ------------------------------------------------------------------------------------------------


def _read(path: Path, ids: Sequence[str], size: int) -> list[Drawn]:
    """The tasks of all groups that are there whole. What a killed process left of another one is cut off."""
    drawn: list[Drawn] = []
    ends = [0]
    if path.is_file():
        with open(path, "rb") as stream:
            for line in stream:
                try:
                    row = orjson.loads(line) if line.endswith(b"\n") else None
                except orjson.JSONDecodeError:
                    row = None
                if not isinstance(row, dict) or len(drawn) == len(ids) or row.get("task_id") != ids[len(drawn)]:
                    break
                samples = tuple(Sample(**s) for s in row["samples"])
                drawn.append(Drawn(row["task_id"], samples, row["problem"]))
                ends.append(ends[-1] + len(line))
        whole = len(drawn) if len(drawn) == len(ids) else len(drawn) // size * size
        os.truncate(path, ends[whole])
        sync(path)
        del drawn[whole:]
    return drawn


def _check_plan(folder: Path, plan: dict[str, Any]) -> None:
    path = folder / _PLAN
    text = orjson.dumps(plan, option=orjson.OPT_INDENT_2) + b"\n"
    if path.is_file():
        before, now = orjson.loads(path.read_bytes()), orjson.loads(text)
        changed = [name for name in ("model", "tasks") if before.get(name) != now[name]]
        changed += [k for k, value in now["options"].items() if before.get("options", {}).get(k) != value]
        if changed:
            raise ValueError(
                f"{folder}: has samples that were drawn with other settings: {', '.join(changed)}. Restore them, "
                "choose another output, or remove the folder"
            )
        return
    stage = folder / f".{_PLAN}.tmp"
    stage.write_bytes(text)
    sync(stage)
    stage.replace(path)
    sync(folder)


def _digest_model(folder: Path) -> str:
    """Of the files that decide what is generated."""
    digest = hashlib.blake2b(digest_size=16)
    names = {path.name for pattern in ("*.safetensors", "*.safetensors.index.json") for path in folder.glob(pattern)}
    for name in sorted(names | {"config.json", *FILES}):
        path = folder / name
        if path.is_file():
            digest.update(f"{name}\0{path.stat().st_size}\0".encode())
            with open(path, "rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def _digest_tasks(tasks: Sequence[Task]) -> str:
    # json and not orjson: what a file escapes may be a lone surrogate, which is for the engine to refuse
    content = json.dumps([dataclasses.astuple(task) for task in tasks])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
