"""Does a sample solve its task? It is executed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from fastsft.verify.compare import agrees, checked
from fastsft.verify.languages import Language, built_in_languages, program
from fastsft.verify.pool import SupervisorError
from fastsft.verify.sandbox import Limits, SandboxResult, refused, run
from fastsft.verify.tasks import Task

_EXCEPTION = re.compile(r"(?:[A-Za-z_]\w*\.)*([A-Z]\w*)(?::|$)")


def judge(
    pairs: Sequence[tuple[Task, str]],
    *,
    workers: int = 2,
    limits: Limits | None = None,
    languages: Mapping[str, Language] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[SandboxResult]:
    """One result per pair of a task and a sample, ``ok`` if the sample solves the task. Equal pairs run once.

    With a check, the sample passes if the check runs to its end; one that exits before (``sys.exit(0)``) does not. With
    cases, it runs once for each, until one fails: what it writes must be what is expected, as the task compares. The
    limits are those of each run; a language may have its own.

    Args:
        workers: samples that run at once.
        languages: besides those of languages.toml, or instead.
        progress: called with (pairs done, all).

    Raises:
        RuntimeError: the sandbox cannot be set up on this machine, or a language's command is not there.
        ValueError: no worker; a task in an unknown language; a checker that fails.
    """
    check_workers(workers)
    known = {**built_in_languages(), **(languages or {})}
    for task, _ in pairs:
        if task.language != "python" and task.language not in known:
            expected = ", ".join(sorted({"python", *known}))
            raise ValueError(f"task {task.task_id}: language: expected one of {expected}, got {task.language!r}")
    results: list[SandboxResult] = []
    pool = ThreadPoolExecutor(workers)
    try:
        running: dict[tuple[Task, str], Future[SandboxResult]] = {}
        for pair in pairs:
            if pair not in running:
                running[pair] = pool.submit(_judge_one, *pair, limits, known)
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


def check_workers(workers: int) -> None:
    """Raise a ValueError where there is none."""
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")


def failure_kind(result: SandboxResult) -> str:
    """The exception that ended it where that can be told, otherwise its status."""
    if result.status in ("error", "wrong", "compile_error") and (lines := result.stderr.strip().splitlines()):
        found = _EXCEPTION.match(lines[-1])
        return found[1] if found else result.status
    return result.status


def last_words(result: SandboxResult) -> str:
    """The last line that a sample which did not pass wrote to stderr; empty if it passed."""
    return "" if result.status == "ok" else result.stderr.strip().rpartition("\n")[2][:500]


def _judge_one(task: Task, sample: str, limits: Limits | None, known: Mapping[str, Language]) -> SandboxResult:
    code = task.prefix + sample
    if not task.cases:
        return run(code, check=task.check, limits=limits)
    try:
        with program(None if task.language == "python" else known[task.language], code, limits) as answer:
            for number, (given, expected) in enumerate(task.cases, 1):
                result = answer(given)
                if result.status != "ok":
                    break
                if said := _objection(task, given, expected, result.stdout, limits):
                    said = f"WrongOutput: case {number}: {said}\n"
                    return dataclasses.replace(result, status="wrong", stderr=result.stderr + said)
    except SupervisorError as error:
        return refused(error)
    return result


def _objection(task: Task, given: str, expected: str, written: str, limits: Limits | None) -> str | None:
    if task.checker:
        try:
            return checked(task.checker, given, expected, written, limits)
        except ValueError as error:
            raise ValueError(f"task {task.task_id}: {error}") from None
    if agrees(written, expected, task.compare, task.tolerance):
        return None
    return f"expected {expected!r:.200}, got {written!r:.200}"
