"""pass@k: how often at least one of k samples of a task passes its tests (Chen et al., arXiv 2107.03374)."""

from __future__ import annotations

import gzip
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsft.verify.sandbox import Limits, SandboxResult, run_all


@dataclass(frozen=True)
class Task:
    """``check`` is code that raises if the solution is wrong. A sample is appended to ``prefix`` (empty for whole
    solutions, a function head for completions); the check runs after it, in the same module."""

    task_id: str
    prompt: str
    check: str
    prefix: str = ""


@dataclass(frozen=True)
class TaskReport:
    task_id: str
    passed: int
    results: tuple[SandboxResult, ...]

    @property
    def failure(self) -> str | None:
        """How the first sample that did not pass ended: its status and the last line of its stderr."""
        failed = next((r for r in self.results if r.status != "ok"), None)
        if failed is None:
            return None
        return ": ".join([failed.status, *failed.stderr.strip().splitlines()[-1:]])


@dataclass(frozen=True)
class PassReport:
    """``pass_at[k]`` is the mean over tasks; ``statuses`` counts how the runs ended."""

    pass_at: dict[int, float]
    statuses: dict[str, int]
    tasks: tuple[TaskReport, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "pass_at": {str(k): v for k, v in self.pass_at.items()},
            "statuses": self.statuses,
            "tasks": [
                {"task_id": t.task_id, "passed": t.passed, "samples": len(t.results), "failure": t.failure}
                for t in self.tasks
            ],
        }


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate 1 - C(n - c, k) / C(n, k) from c passes among n samples.

    Raises:
        ValueError: not 0 <= c <= n or not 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k: expected 0 <= c <= n and 1 <= k <= n, got {n=}, {c=}, {k=}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def evaluate_tasks(
    tasks: Sequence[Task],
    samples: Sequence[Sequence[str]],
    *,
    k: Sequence[int] = (1,),
    workers: int = 2,
    limits: Limits | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PassReport:
    """Execute every sample of every task in the sandbox. A sample passes if its check runs to the end; one that exits
    before (``sys.exit(0)``) does not.

    Args:
        samples: for each task its samples, at least max(k).
        progress: called with (samples executed, all).

    Raises:
        ValueError: numbers that do not fit. RuntimeError: the sandbox cannot be set up on this machine.
    """
    if len(samples) != len(tasks) or any(len(s) < max(k) for s in samples):
        raise ValueError(f"evaluate_tasks: expected at least {max(k)} samples for each of {len(tasks)} tasks")
    groups = list(zip(tasks, samples, strict=True))
    codes = [task.prefix + sample for task, group in groups for sample in group]
    checks = [task.check for task, group in groups for _ in group]
    results = run_all(codes, checks=checks, workers=workers, limits=limits, progress=progress)
    for result in results:
        if result.status == "refused":
            raise RuntimeError(f"sandbox: {result.stderr}")
    reports = []
    for task, group in groups:
        ended, results = tuple(results[: len(group)]), results[len(group) :]
        reports.append(TaskReport(task.task_id, sum(r.status == "ok" for r in ended), ended))
    statuses = Counter(r.status for t in reports for r in t.results)
    pass_at = {
        n: sum(pass_at_k(len(t.results), t.passed, n) for t in reports) / len(reports) if reports else math.nan
        for n in k
    }
    return PassReport(pass_at, {str(s): n for s, n in statuses.items()}, tuple(reports))


def read_tasks(path: str | os.PathLike[str]) -> list[Task]:
    """Tasks of a JSONL(.gz) file: rows with task_id, prompt and either ``check``, or HumanEval's test and entry_point.

    Raises:
        ValueError: a row that is neither; names file and line.
    """
    where = Path(path)
    opener: Any = gzip.open if where.suffix == ".gz" else open
    tasks = []
    with opener(where, "rt", encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if "entry_point" in row:  # a completion of the prompt, checked by check(function)
                    check = f"{row['test']}\n\ncheck({row['entry_point']})"
                    tasks.append(Task(row["task_id"], row["prompt"], check, row["prompt"]))
                else:
                    tasks.append(Task(row["task_id"], row["prompt"], row["check"], row.get("prefix", "")))
            except KeyError as error:
                raise ValueError(f"{where}:{number}: expected task_id, prompt and check, found no {error}") from None
            except (ValueError, TypeError) as error:
                raise ValueError(f"{where}:{number}: expected an object: {error}") from None
    return tasks


def extract_code(text: str) -> str:
    """The first fenced block of an answer, or the whole answer where there is none."""
    _, fence, rest = text.partition("```")
    if not fence:
        return text
    body = rest.partition("```")[0]
    language, newline, code = body.partition("\n")
    return code if newline and (not language.strip() or language.strip().isalnum()) else body
