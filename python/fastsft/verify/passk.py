"""pass@k: how often at least one of k samples of a task passes its tests (Chen et al., arXiv 2107.03374)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastsft.verify.judge import judge
from fastsft.verify.sandbox import Limits, SandboxResult
from fastsft.verify.tasks import Task


@dataclass(frozen=True)
class TaskReport:
    """One task: how many of its samples passed, and what became of each."""

    task_id: str | int
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
    """Execute every sample of every task in the sandbox, see :func:`fastsft.verify.judge.judge`.

    Args:
        samples: for each task its samples, at least max(k).
        progress: called with (samples executed, all).

    Raises:
        ValueError: numbers that do not fit. RuntimeError: the sandbox cannot be set up on this machine.
    """
    if len(samples) != len(tasks) or any(len(s) < max(k) for s in samples):
        raise ValueError(
            f"evaluate_tasks: samples: expected at least {max(k)} for each of {len(tasks)} tasks, "
            f"got {[len(s) for s in samples][:20]}"
        )
    groups = list(zip(tasks, samples, strict=True))
    pairs = [(task, sample) for task, group in groups for sample in group]
    results = judge(pairs, workers=workers, limits=limits, progress=progress)
    reports = []
    for task, group in groups:
        ended, results = results[: len(group)], results[len(group) :]
        reports.append(TaskReport(task.task_id, sum(r.status == "ok" for r in ended), tuple(ended)))
    statuses = Counter(r.status for t in reports for r in t.results)
    pass_at = {
        n: sum(pass_at_k(len(t.results), t.passed, n) for t in reports) / len(reports) if reports else math.nan
        for n in k
    }
    return PassReport(pass_at, {str(s): n for s, n in statuses.items()}, tuple(reports))
