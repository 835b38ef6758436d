"""Rounds of sampling from a model, executing what it wrote, and training it on what passed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson

from fastsft.config import ConfigError
from fastsft.data.lock import hold
from fastsft.progress import Progress
from fastsft.synthesis.draw import draw
from fastsft.synthesis.plan import Plan
from fastsft.synthesis.rejection import sample_tasks
from fastsft.train.checkpoint import write_file
from fastsft.train.trainer import Trainer
from fastsft.verify.tasks import Task, read_tasks


def iterate(
    plan: Plan,
    *,
    workers: int = 2,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Run all rounds, or go on where an earlier process was killed.

    A round draws samples from the newest model, keeps those that pass, trains on the rows of all rounds so far, and
    measures pass@1 (greedy) on the held-out tasks. Each of the four goes on by itself after a kill.

    Args:
        workers: samples executed at once.
        progress: called with (stage, done, total).
        say: called with a line after each part of a round.

    Returns:
        Round 0, which is the first model's pass@1, and one entry per round: ``held_out_pass_at_1``, ``sampling`` (the
        report), ``rows`` (those of earlier rounds included), ``loss`` (of the last step), ``model``.

    Raises:
        ConfigError: the output folder is in use, or of another plan; or a held-out task is among the tasks. ValueError:
            nothing passed, so that there is nothing to train on; see also :func:`fastsft.synthesis.draw.draw`.
    """
    tasks, held_out = _tasks(plan.tasks), _tasks(plan.held_out)
    shared = {t.prompt for t in tasks} & {t.prompt for t in held_out}
    if shared:
        raise ConfigError(f"held_out: expected other tasks than those sampled, got {min(shared)!r:.200}")
    output = Path(plan.output)
    with hold(output):
        _check_plan(output / "plan.json", plan)
        rounds = [_first(plan, held_out, workers, progress)]
        say(f"before: held-out pass@1 {rounds[0]['held_out_pass_at_1']:.3f}")
        for number in range(1, plan.rounds + 1):
            rounds.append(_round(plan, number, rounds, tasks, held_out, workers, progress, say))
        write_file(output / "results.json", json.dumps(rounds, indent=2) + "\n")
    return rounds


def _first(plan: Plan, held_out: Sequence[Task], workers: int, progress: Progress | None) -> dict[str, Any]:
    rate = _pass_at_1(plan, Path(plan.model), Path(plan.output) / "held_out", held_out, workers, progress)
    return {"round": 0, "held_out_pass_at_1": rate, "model": plan.model}


def _round(
    plan: Plan,
    number: int,
    before: list[dict[str, Any]],
    tasks: Sequence[Task],
    held_out: Sequence[Task],
    workers: int,
    progress: Progress | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    folder, seed = plan.folder(number), plan.seed_of(number)
    done = folder / "round.json"
    if done.is_file():
        say(f"round {number}: done before")
        found: dict[str, Any] = orjson.loads(done.read_bytes())
        return found
    folder.mkdir(parents=True, exist_ok=True)
    newest = Path(before[-1]["model"])
    rows = folder / "data.jsonl"
    sampling = sample_tasks(
        newest, tasks, rows, drawing=dataclasses.replace(plan.draw, seed=seed),
        selection=dataclasses.replace(plan.select, seed=seed), workers=workers, progress=progress,
    )  # fmt: skip
    say(f"round {number}: {sampling['passed']} of {sampling['samples']} samples passed, {sampling['rows']} rows")
    files = [plan.folder(i) / "data.jsonl" for i in range(1, number + 1)]
    count = sampling["rows"] + (before[-1].get("rows", 0))
    if not count:
        raise ValueError(f"round {number}: none of {sampling['samples']} samples became a row: easier tasks, a better "
                         "model or more samples are needed")  # fmt: skip
    begin = Path(plan.model) if plan.restart else newest
    trained = Trainer(plan.training(number, begin, [f for f in files if f.stat().st_size])).run()
    rate = _pass_at_1(plan, trained.model_path, folder / "held_out", held_out, workers, progress)
    say(f"round {number}: held-out pass@1 {rate:.3f}")
    result = {
        "round": number, "held_out_pass_at_1": rate, "sampling": sampling, "rows": count, "loss": trained.train_loss,
        "model": str(trained.model_path),
    }  # fmt: skip
    write_file(done, json.dumps(result, indent=2) + "\n")
    return result


def _pass_at_1(
    plan: Plan, model: Path, folder: Path, tasks: Sequence[Task], workers: int, progress: Progress | None
) -> float:
    """The share of tasks that the most probable answer solves; one whose prompt does not fit is not solved."""
    greedy = dataclasses.replace(plan.draw, n=1, temperature=0.0, top_p=1.0)
    drawn = draw(model, tasks, folder, greedy, workers=workers, progress=progress)
    return sum(d.passed for d in drawn) / len(drawn)


def _tasks(files: Sequence[str]) -> list[Task]:
    found = [task for file in files for task in read_tasks(file)]
    if not found:
        raise ConfigError(f"{', '.join(files)}: no task")
    return found


def _check_plan(path: Path, plan: Plan) -> None:
    """What may change between two calls is the number of rounds, and the name of the folder."""
    now = orjson.loads(orjson.dumps(dataclasses.asdict(plan)))
    if path.is_file():
        before = orjson.loads(path.read_bytes())
        changed = [key for key in now if key not in ("rounds", "output") and before.get(key) != now[key]]
        if changed:
            raise ConfigError(
                f"{path.parent}: has rounds of another plan, which differs in {', '.join(changed)}. Restore it, choose "
                "another output, or remove the folder"
            )
    write_file(path, json.dumps(now, indent=2) + "\n")
