"""Does a sample solve its task? It is executed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from fastsft.verify.sandbox import Limits, SandboxResult, run
from fastsft.verify.tasks import Task

_EXCEPTION = re.compile(r"(?:[A-Za-z_]\w*\.)*([A-Z]\w*)(?::|$)")


def judge(
    pairs: Sequence[tuple[Task, str]],
    *,
    workers: int = 2,
    limits: Limits | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[SandboxResult]:
    """One result per pair of a task and a sample, ``ok`` if the sample solves the task. Equal pairs run once.

    With a check, the sample passes if the check runs to its end; one that exits before (``sys.exit(0)``) does not. With
    cases, it runs once for each, until one fails: the lines that it writes must be those expected, but for blanks at
    their ends and empty lines at the end. The limits are those of each run.

    Args:
        workers: samples that run at once.
        progress: called with (pairs done, all).

    Raises:
        RuntimeError: the sandbox cannot be set up on this machine.
    """
    results: list[SandboxResult] = []
    pool = ThreadPoolExecutor(workers)
    try:
        running: dict[tuple[Task, str], Future[SandboxResult]] = {}
        for pair in pairs:
            if pair not in running:
                running[pair] = pool.submit(_judge_one, *pair, limits)
        for pair in pairs:
            result = running[pair].result()
            if result.status == "refused":
                raise RuntimeError(f"sandbox: {result.stderr}")
            results.append(result)
            if progress:
                progress(len(results), len(pairs))
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C the others are not waited for
    return results


def failure_kind(result: SandboxResult) -> str:
    """The exception that ended it where that can be told, otherwise its status."""
    if result.status in ("error", "wrong", "compile_error") and (lines := result.stderr.strip().splitlines()):
        found = _EXCEPTION.match(lines[-1])
        return found[1] if found else result.status
    return result.status


def _judge_one(task: Task, sample: str, limits: Limits | None) -> SandboxResult:
    code = task.prefix + sample
    if not task.cases:
        return run(code, check=task.check, limits=limits)
    for number, (given, expected) in enumerate(task.cases, 1):
        result = run(code, stdin=given, limits=limits)
        if result.status != "ok":
            break
        if _lines(result.stdout) != _lines(expected):
            said = f"WrongOutput: case {number}: expected {expected!r:.200}, got {result.stdout!r:.200}\n"
            return dataclasses.replace(result, status="wrong", stderr=result.stderr + said)
    return result


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]
