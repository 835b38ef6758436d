"""pass@k of ``fastsft eval``: samples that the model draws, or those of a file, executed and reported."""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsft.progress import Progress
from fastsft.synthesis.draw import DrawOptions, draw
from fastsft.synthesis.journal import digest_model, digest_tasks
from fastsft.synthesis.score import Outcome, read_samples, score
from fastsft.verbs.console import UsageError, to_json, write_text
from fastsft.verify.languages import read_languages
from fastsft.verify.passk import pass_at_k
from fastsft.verify.sandbox import Limits, run
from fastsft.verify.tasks import Task, read_tasks


@dataclass(frozen=True)
class Scoring:
    """What ``fastsft eval`` was asked for, as far as tasks go: ``model`` draws, unless ``samples`` are there."""

    model: Path | None
    tasks: Path
    samples: Path | None
    output: Path | None
    languages: Path | None
    k: tuple[int, ...]
    workers: int
    options: DrawOptions
    speculation: dict[str, Any] | None


def pass_at(scoring: Scoring, tell: Progress) -> dict[str, Any]:
    """The report; in ``output`` also as report.json and report.html, beside completions.jsonl with the samples drawn.

    Raises:
        UsageError: what the user can mend.
    """
    tasks, options = read_tasks(scoring.tasks), scoring.options
    if not tasks:
        raise UsageError(f"eval: {scoring.tasks}: no task")
    languages = read_languages(scoring.languages) if scoring.languages else {}
    limits = Limits(seconds=options.seconds)
    settings: dict[str, Any] = {"k": list(scoring.k), "tasks": str(scoring.tasks),
                                "tasks_hash": digest_tasks(tasks, languages)}  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = scoring.output or Path(temporary)
        if scoring.samples is not None:
            samples = read_samples(scoring.samples, tasks)
            _enough(tasks, Counter(task.task_id for task, _ in samples), scoring)
            settings |= {"samples": str(scoring.samples), "seconds": options.seconds}
            outcomes = score(samples, folder, limits=limits, workers=scoring.workers, languages=languages,
                             progress=lambda done, total: tell("executed", done, total))  # fmt: skip
        elif scoring.model is not None:
            drawn = draw(scoring.model, tasks, folder, options, workers=scoring.workers, languages=languages,
                         speculative_config=scoring.speculation, progress=tell)  # fmt: skip
            if problem := next((d for d in drawn if d.problem), None):
                raise UsageError(f"eval: task {problem.task_id}: {problem.problem}")
            outcomes = [Outcome(d.task_id, s.failure, s.said, 0.0) for d in drawn for s in d.samples]
            from fastsft import __version__

            settings |= {**dataclasses.asdict(options), "model": str(scoring.model), "engine": f"fastsft {__version__}",
                         "weights_hash": digest_model(scoring.model)}  # fmt: skip
            if scoring.output:
                _write_completions(tasks, drawn, options.completion, scoring.output / "completions.jsonl")
        else:
            raise UsageError("eval: --tasks: expected a model that answers them, or --samples")
    settings["layers"] = list(run("pass").layers)
    report = _report(tasks, outcomes, scoring.k, settings)
    if scoring.output:
        from fastsft.report.evaluation import evaluation_page

        write_text(scoring.output / "report.json", to_json(report))
        write_text(scoring.output / "report.html", evaluation_page(report))
    return report


def _enough(tasks: Sequence[Task], counts: Counter[str | int], scoring: Scoring) -> None:
    for task in tasks:
        if counts[task.task_id] < max(scoring.k):
            raise UsageError(
                f"eval: {scoring.samples}: expected at least {max(scoring.k)} samples of each task for --k "
                f"{max(scoring.k)}, got {counts[task.task_id]} of {task.task_id}"
            )


def _report(
    tasks: Sequence[Task], outcomes: list[Outcome], k: Sequence[int], settings: dict[str, Any]
) -> dict[str, Any]:
    by_task: dict[str | int, list[Outcome]] = {task.task_id: [] for task in tasks}
    for outcome in outcomes:
        by_task[outcome.task_id].append(outcome)
    rows: list[dict[str, Any]] = []
    for task_id, found in by_task.items():
        failures = Counter(o.failure for o in found if o.failure)
        first = next((f"{o.failure}: {o.said}" for o in found if o.failure), None)
        passed = len(found) - failures.total()
        rows.append({"task_id": task_id, "samples": len(found), "passed": passed, "failures": dict(failures),
                     "failure": first})  # fmt: skip
    kinds = Counter(o.failure for o in outcomes if o.failure)
    means = {str(size): sum(pass_at_k(r["samples"], r["passed"], size) for r in rows) / len(rows) for size in k}
    return {"pass_at": means, "samples": len(outcomes), "passed": len(outcomes) - kinds.total(),
            "failures": dict(kinds.most_common()), "tasks": rows, "settings": settings}  # fmt: skip


def _write_completions(tasks: Sequence[Task], drawn: Sequence[Any], completion: bool, path: Path) -> None:
    """One line per sample, for other scorers too. A completion continues the task's prefix."""
    import orjson

    from fastsft.verify.answers import code_of

    lines = [
        {"task_id": d.task_id, "completion": code_of(s.text, completion=completion)} for d in drawn for s in d.samples
    ]
    write_text(path, "".join(orjson.dumps(line).decode() + "\n" for line in lines))
