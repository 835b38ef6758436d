"""``fastsft sample``: training data from tasks that can be checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from fastsft.verbs.console import UsageError, print_json
from fastsft.verbs.speculating import read_speculation


def sample(
    model: Path,
    tasks: Path,
    /,
    *,
    output: Path,
    n: int = 8,
    temperature: float = 0.8,
    top_p: float = 1.0,
    max_tokens: int = 512,
    seed: int = 0,
    completion: bool = False,
    stop: tuple[str, ...] = (),
    per_task: int = 4,
    choose: Literal["shortest", "random"] = "shortest",
    near: float = 0.9,
    near_all: float = 0.95,
    seconds: float = 5.0,
    workers: int = 2,
    dtype: Literal["float32", "bfloat16"] = "float32",
    speculative_config: str | None = None,
    device: str = "cpu",
    json: bool = False,
) -> None:
    """Draw answers to tasks, execute them in a sandbox, and keep those that pass as training rows.

    What was drawn stays in OUTPUT.samples, and the same command after a kill goes on.

    Args:
        model: folder with config.json, weights and tokenizer.
        tasks: JSONL(.gz) of tasks: task_id, prompt, and check or cases; or HumanEval's fields.
        output: JSON lines of messages, or with --completion of prompt and completion; and of meta.
        n: samples per task.
        temperature: of the draws.
        top_p: draw among the most probable tokens that have this share together.
        max_tokens: most tokens per sample; one that does not end before is no row.
        seed: of the draws and of --choose random.
        completion: continue the prompt as it is, not as a chat message.
        stop: strings that end a sample.
        per_task: most rows of one task; 0 is no limit.
        choose: which of a task's samples become rows if there are more.
        near: similarity of two answers to a task from which one of them is left out; 0 is never.
        near_all: similarity of any two rows from which the second is left out; 0 is never.
        seconds: time that one run of a sample may take.
        workers: samples executed at once.
        dtype: of weights and cache.
        speculative_config: guess tokens and check several in a step: JSON such as '{"method": "ngram"}'
            (docs/engine.md). No sample changes.
        device: cpu, or cuda for a GPU, whose kernels are of --dtype bfloat16.
        json: machine-readable report.
    """
    from fastsft.progress import bars
    from fastsft.synthesis.draw import DrawOptions
    from fastsft.synthesis.rejection import sample_tasks
    from fastsft.synthesis.select import SelectOptions
    from fastsft.verify.tasks import read_tasks

    speculation = read_speculation("sample", speculative_config)
    given = read_tasks(tasks)
    if not given:
        raise UsageError(f"sample: {tasks}: no task")
    drawing = DrawOptions(n, temperature, top_p, max_tokens, seed, completion, stop, dtype, seconds, device)
    selection = SelectOptions(per_task, choose, near, near_all, seed)
    with bars() as tell:
        report = sample_tasks(
            model, given, output, drawing=drawing, selection=selection, workers=workers,
            speculative_config=speculation, progress=tell,
        )  # fmt: skip
    if json:
        print_json({**report, "output": str(output)})
    else:
        _show(report, output)


def _show(report: dict[str, Any], output: Path) -> None:
    print(f"{report['samples']} samples of {report['tasks']} tasks, {report['passed']} passed, "
          f"{report['tasks_solved']} tasks solved at least once")  # fmt: skip
    print(f"tasks by share of samples passed: {_listed(report['pass_rates'])}")
    if report["failures"]:
        print(f"failures: {_listed(report['failures'])}")
    if report["dropped"]:
        print(f"no rows: {_listed(report['dropped'])}")
    if report["tasks_left_out"]:
        print(f"{report['tasks_left_out']} tasks left out, e.g. {report['tasks_left_out_examples'][0]}")
    print(f"{report['rows']} rows: {output}")


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.items())
