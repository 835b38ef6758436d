"""``fastsft eval``."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastsft.verbs.console import UsageError, print_json

if TYPE_CHECKING:
    from fastsft.data.prepare import Progress
    from fastsft.engine.request import SamplingParams
    from fastsft.models.decoder import Decoder
    from fastsft.models.tokenizer import Tokenizer
    from fastsft.verify.tasks import Task


def evaluate(
    model: Path,
    /,
    *,
    data: tuple[Path, ...] = (),
    tasks: Path | None = None,
    k: tuple[int, ...] = (1,),
    n: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    max_tokens: int = 256,
    completion: bool = False,
    stop: tuple[str, ...] = (),
    fields: dict[str, str] | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    json: bool = False,
) -> None:
    """Loss on held-out data, and pass@k on tasks whose answers are executed in a sandbox.

    Args:
        model: folder with config.json, weights and tokenizer.
        data: held-out files, in the formats of training data.
        tasks: JSONL(.gz) of tasks: task_id, prompt, and check or cases; or HumanEval's fields.
        k: pass@k for each of these.
        n: samples per task, at least the largest k.
        temperature: 0 is greedy.
        seed: of the draws.
        max_tokens: most tokens per sample.
        completion: continue the prompt as it is, not as a chat message.
        stop: strings that end a sample.
        fields: names used in the files, as in data.fields of a run.
        dtype: of weights and cache.
        json: machine-readable output.
    """
    import torch

    from fastsft.engine.request import SamplingParams
    from fastsft.models.tokenizer import Tokenizer
    from fastsft.models.weights import load_model
    from fastsft.progress import bars
    from fastsft.verify.tasks import read_tasks

    if not data and tasks is None:
        raise UsageError("eval: give --data, --tasks or both")
    if tasks is not None and not 1 <= min(k, default=0) <= max(k, default=0) <= n:
        raise UsageError(f"eval: --k: expected numbers from 1 to --n, {n}, got {', '.join(map(str, k)) or 'none'}")
    params = SamplingParams(n=n, temperature=temperature, seed=seed, stop=stop, max_tokens=max_tokens)
    rows = [] if tasks is None else read_tasks(tasks)
    if tasks is not None and not rows:
        raise UsageError(f"eval: {tasks}: no task")
    decoder, tokenizer = load_model(model, dtype=getattr(torch, dtype)), Tokenizer.from_folder(model)
    results: dict[str, Any] = {}
    with bars() as tell:
        if data:
            results["loss"] = _held_out_loss(decoder, tokenizer, data, fields or {}, tell)
        if tasks is not None:
            results["tasks"] = _pass_at(decoder, tokenizer, rows, params, k, completion, tell)
    if json:
        print_json(results)
    else:
        _show(results)


def _held_out_loss(
    decoder: Decoder,
    tokenizer: Tokenizer,
    data: tuple[Path, ...],
    fields: dict[str, str],
    tell: Progress,
) -> dict[str, Any]:
    from fastsft.data.notices import notices
    from fastsft.train.evaluate import evaluate_loss
    from fastsft.train.held_out import CAPACITY, read_held_out

    store, report = read_held_out(data, tokenizer, decoder.config, fields=fields)
    result = evaluate_loss(decoder, store, capacity=CAPACITY, progress=functools.partial(tell, "held-out loss"))
    if result is None:
        raise UsageError("; ".join([f"eval: {', '.join(map(str, data))}: no usable row", *notices(report)]))
    return {**dataclasses.asdict(result), "samples": len(store), **report}


def _pass_at(
    decoder: Decoder,
    tokenizer: Tokenizer,
    tasks: list[Task],
    params: SamplingParams,
    k: tuple[int, ...],
    completion: bool,
    tell: Progress,
) -> dict[str, Any]:
    from fastsft.engine.llm import LLM
    from fastsft.engine.request import PromptError
    from fastsft.verify.answers import ask, codes_of
    from fastsft.verify.passk import evaluate_tasks

    llm = LLM(decoder, tokenizer)
    generating, executing = functools.partial(tell, "generating"), functools.partial(tell, "executing")
    try:
        outputs = ask(llm, tasks, params, completion=completion, progress=generating)
    except PromptError as error:
        raise UsageError(f"eval: task {tasks[error.number].task_id}: {error.problem}") from None
    return evaluate_tasks(tasks, codes_of(outputs, completion=completion), k=k, progress=executing).to_dict()


def _show(results: dict[str, Any]) -> None:
    from fastsft.data.notices import notices

    if loss := results.get("loss"):
        print(f"held-out loss {loss['loss']:.4f} over {loss['tokens']} tokens of {loss['samples']} samples")
        for line in notices(loss):
            print(line)
    if tasks := results.get("tasks"):
        for size, value in tasks["pass_at"].items():
            print(f"pass@{size} {value:.3f} over {len(tasks['tasks'])} tasks {tasks['statuses']}")
        if failed := next((t for t in tasks["tasks"] if t["failure"]), None):
            print(f"failed, e.g. {failed['task_id']}: {failed['failure']}")
