"""Samples that somebody drew, judged: what is finished is on disk, and is not executed again."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from fastsft.data.lock import hold
from fastsft.synthesis.journal import check_plan, digest_json, digest_tasks, read_whole
from fastsft.verify.judge import failure_kind, judge, last_words
from fastsft.verify.languages import Language
from fastsft.verify.sandbox import Limits
from fastsft.verify.tasks import Task, read_rows

_RESULTS = "results.jsonl"
_GROUP = 64  # samples between two writes


@dataclass(frozen=True)
class Outcome:
    """``failure``: None if the sample passed, otherwise how it failed; ``said``: its last words, then."""

    task_id: str | int
    failure: str | None
    said: str
    seconds: float


def read_samples(path: str | os.PathLike[str], tasks: Sequence[Task]) -> list[tuple[Task, str]]:
    """Samples of a JSONL(.gz) file: task_id and ``completion``, which continues the task's prefix, or ``solution``,
    which is whole.

    Raises:
        ValueError: a row that is neither, or of no task; names file and line.
    """
    known = {task.task_id: task for task in tasks}
    samples = []
    for place, row in read_rows(path):
        text = row.get("solution", row.get("completion"))
        if not isinstance(text, str):
            raise ValueError(f"{place}: expected task_id and completion or solution, got {row!r:.80}")
        task_id = row.get("task_id")
        task = known.get(task_id) if isinstance(task_id, str | int) else None
        if task is None:
            raise ValueError(f"{place}: task_id: expected one of the tasks, got {task_id!r:.80}")
        samples.append((dataclasses.replace(task, prefix="") if "solution" in row else task, text))
    return samples


def score(
    samples: Sequence[tuple[Task, str]],
    folder: str | os.PathLike[str],
    *,
    limits: Limits,
    workers: int = 2,
    languages: Mapping[str, Language] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """Execute the samples in the sandbox, one result for each, in order.

    Finished ones are in ``folder``: the same call after a kill goes on where it was, and ends with the same verdicts.

    Raises:
        ConfigError: another process works in ``folder``. ValueError: ``folder`` has results of other samples, tasks or
            limits. RuntimeError: the sandbox cannot be set up.
    """
    place = Path(folder)
    with hold(place):
        check_plan(place, {"samples": digest_json([[t.task_id, text] for t, text in samples]),
                           "tasks": digest_tasks([task for task, _ in samples], languages),
                           "options": dataclasses.asdict(limits)}, "results of samples")  # fmt: skip
        path = place / _RESULTS
        rows = read_whole(path, [task.task_id for task, _ in samples], 1)
        outcomes = [Outcome(**row) for row in rows]
        with open(path, "ab") as stream:
            for begin in range(len(outcomes), len(samples), _GROUP):
                group = samples[begin : begin + _GROUP]
                told = None if progress is None else _after(progress, begin, len(samples))
                results = judge(group, workers=workers, limits=limits, languages=languages, progress=told)
                found = [
                    Outcome(task.task_id, failure_kind(r) if r.status != "ok" else None, last_words(r), r.seconds)
                    for (task, _), r in zip(group, results, strict=True)
                ]
                stream.write(b"".join(orjson.dumps(dataclasses.asdict(o)) + b"\n" for o in found))
                stream.flush()
                os.fsync(stream.fileno())
                outcomes += found
    return outcomes


def _after(progress: Callable[[int, int], None], begin: int, total: int) -> Callable[[int, int], None]:
    return lambda done, _: progress(begin + done, total)
