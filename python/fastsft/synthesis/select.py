"""Training rows from samples that passed: few of each task, none nearly equal to another."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastsft import ops
from fastsft.data.dedup import dedup
from fastsft.data.records import Record
from fastsft.synthesis.draw import Drawn
from fastsft.verify.answers import code_of
from fastsft.verify.tasks import Task


@dataclass(frozen=True)
class SelectOptions:
    """Which of the samples that passed become rows.

    ``near`` and ``near_all`` are similarities of sets of character 5-grams from which one of two is left out; 0: it is
    not asked.
    """

    per_task: int = 4
    """Most rows of one task; 0: no limit."""
    choose: Literal["shortest", "random"] = "shortest"
    near: float = 0.9
    """Of the code of two answers to one task."""
    near_all: float = 0.95
    """Of any two rows, prompt and answer together: the first one stays."""
    seed: int = 0
    """Of ``choose = "random"``."""


def select(
    tasks: Sequence[Task], drawn: Sequence[Drawn], options: SelectOptions, *, completion: bool
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows in the order of the tasks and samples, and the report on what was drawn and what became of it.

    Args:
        completion: rows have prompt and completion; otherwise messages.

    Raises:
        ValueError: an option out of range.
    """
    if options.per_task < 0:
        raise ValueError(f"per_task: expected at least 0, got {options.per_task}")
    for name in ("near", "near_all"):
        if not 0 <= getattr(options, name) <= 1:
            raise ValueError(f"{name}: expected a similarity in [0, 1], got {getattr(options, name)}")
    dropped: Counter[str] = Counter()
    chosen: list[tuple[Task, Drawn, int]] = []
    for task, found in zip(tasks, drawn, strict=True):
        chosen += [(task, found, i) for i in _of_task(found, options, dropped, completion=completion)]
    rows = [_row(*choice, completion=completion) for choice in chosen]
    if options.near_all and rows:
        records = [
            Record("prompt_completion", f"{t.task_id}#{i}", parts=(t.prompt, d.samples[i].text)) for t, d, i in chosen
        ]
        kept = dedup(records, threshold=options.near_all, unit="char", mode="all_pairs").keep.tolist()
        dropped["nearly equal to a row before it"] += len(rows) - sum(kept)
        rows = [row for row, keep in zip(rows, kept, strict=True) if keep]
    return rows, _report(drawn, rows, dropped)


def _of_task(found: Drawn, options: SelectOptions, dropped: Counter[str], *, completion: bool) -> list[int]:
    """Numbers of the samples that stay."""
    passed = [i for i, s in enumerate(found.samples) if s.failure is None and s.finished]
    dropped["failed"] += sum(s.failure is not None for s in found.samples)
    dropped["cut off at max_tokens"] += sum(s.failure is None and not s.finished for s in found.samples)
    if options.choose == "shortest":
        passed.sort(key=lambda i: len(found.samples[i].text))  # the first of equals, as sorting is stable
    else:
        passed.sort(key=lambda i: hashlib.blake2b(f"{options.seed}\0{found.task_id}\0{i}".encode()).digest())
    codes = [code_of(found.samples[i].text, completion=completion) for i in passed]
    labels: list[Any] = list(codes)
    if options.near:
        labels = ops.near_duplicates(codes, threshold=options.near, unit="char", mode="all_pairs").tolist()
    firsts: dict[Any, int] = {}
    for label, i in zip(labels, passed, strict=True):
        firsts.setdefault(label, i)
    best = list(firsts.values())
    dropped["nearly equal to another of its task"] += len(passed) - len(best)
    kept = best[: options.per_task or None]
    dropped["above per_task"] += len(best) - len(kept)
    return sorted(kept)


def _row(task: Task, found: Drawn, number: int, *, completion: bool) -> dict[str, Any]:
    sample = found.samples[number]
    meta = {
        "task_id": task.task_id, "sample": number, "pass_rate": found.pass_rate, "logprob": sample.logprob,
        "tokens": sample.tokens,
    }  # fmt: skip
    if completion:
        return {"prompt": task.prompt, "completion": sample.text, "meta": meta}
    turns = [{"role": "user", "content": task.prompt}, {"role": "assistant", "content": sample.text}]
    return {"messages": turns, "meta": meta}


def _report(drawn: Sequence[Drawn], rows: list[dict[str, Any]], dropped: Counter[str]) -> dict[str, Any]:
    tried = [d for d in drawn if d.problem is None]
    failures = Counter(s.failure for d in tried for s in d.samples if s.failure is not None)
    problems = [f"{d.task_id}: {d.problem}" for d in drawn if d.problem is not None]
    return {
        "tasks": len(drawn),
        "tasks_solved": sum(d.passed > 0 for d in tried),
        "samples": sum(len(d.samples) for d in tried),
        "passed": sum(d.passed for d in tried),
        "pass_at_1": sum(d.pass_rate for d in tried) / len(tried) if tried else None,
        "pass_rates": _histogram([d.pass_rate for d in tried]),
        "rows": len(rows),
        "dropped": {reason: count for reason, count in dropped.items() if count},
        "failures": dict(failures.most_common()),
        "tasks_left_out": len(problems),
        "tasks_left_out_examples": problems[:5],
    }


def _histogram(rates: Sequence[float]) -> dict[str, int]:
    """Tasks by the share of their samples that passed."""
    names = ("0", "up to 1/4", "up to 1/2", "up to 3/4", "below 1", "1")
    places = Counter(5 if rate == 1 else math.ceil(rate * 4) for rate in rates)
    return {name: places[i] for i, name in enumerate(names)}
