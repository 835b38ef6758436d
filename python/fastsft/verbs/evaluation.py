"""``fastsft eval``."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastsft.verbs.console import UsageError, print_json
from fastsft.verbs.speculating import read_speculation

if TYPE_CHECKING:
    from fastsft.models.decoder import Decoder
    from fastsft.models.tokenizer import Tokenizer
    from fastsft.progress import Progress


def evaluate(
    model: Path | None = None,
    /,
    *,
    data: tuple[Path, ...] = (),
    tasks: Path | None = None,
    samples: Path | None = None,
    languages: Path | None = None,
    output: Path | None = None,
    k: tuple[int, ...] = (1,),
    n: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    max_tokens: int = 256,
    completion: bool = False,
    stop: tuple[str, ...] = (),
    seconds: float = 5.0,
    workers: int | None = None,
    fields: dict[str, str] | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    speculative_config: str | None = None,
    device: str = "cpu",
    weights: tuple[Literal["float32", "bfloat16", "int8", "w8a8", "int4"], ...] = (),
    group_size: Literal[32, 64] = 32,
    json: bool = False,
) -> None:
    """Loss on held-out data, and pass@k on tasks whose answers are executed in a sandbox.

    Args:
        model: folder with config.json, weights and tokenizer.
        data: held-out files, in the formats of training data.
        tasks: JSONL(.gz) of tasks: task_id, prompt, and check or cases; or HumanEval's fields.
        samples: score these instead: JSONL(.gz) of task_id and completion or solution. Needs no model.
        languages: TOML of languages that the tasks are in, besides the built-in ones.
        output: folder for samples, results and report. The same command after a kill goes on there.
        k: pass@k for each of these.
        n: samples per task, at least the largest k.
        temperature: 0 is greedy.
        top_p: draw among the most probable tokens that have this share together.
        seed: of the draws.
        max_tokens: most tokens per sample.
        completion: continue the prompt as it is, not as a chat message.
        stop: strings that end a sample.
        seconds: time that one run of a sample may take.
        workers: samples executed at once; one per core by default.
        fields: names used in the files, as in data.fields of a run.
        dtype: of weights and cache.
        speculative_config: guess tokens of the samples and check several in a step: JSON such as
            '{"method": "ngram"}' (docs/engine.md). No sample changes.
        device: where samples are drawn: cpu, or cuda for a GPU, whose kernels are of --dtype bfloat16.
        weights: the loss with weights packed in these formats too, as the engine computes it.
        group_size: of int4, how many inputs share a scale.
        json: machine-readable output.
    """
    import torch

    from fastsft.models.tokenizer import Tokenizer
    from fastsft.models.weights import load_model
    from fastsft.progress import bars

    if not data and tasks is None:
        raise UsageError("eval: give --data, --tasks or both")
    if samples is not None and tasks is None:
        raise UsageError("eval: --samples: expected --tasks with it")
    if model is None and (data or samples is None):
        raise UsageError("eval: expected a model")
    if model is not None and samples is not None:
        raise UsageError("eval: --samples: expected no model, the samples are drawn already")
    if weights and not data:
        raise UsageError("eval: --weights: expected --data with it")
    speculation = read_speculation("eval", speculative_config)
    if speculation is not None and (tasks is None or samples is not None):
        raise UsageError("eval: --speculative-config: expected a model and --tasks with it")
    most = None if samples is not None else n
    if tasks is not None and not (k and min(k) >= 1 and (most is None or max(k) <= most)):
        expected = "numbers from 1" if most is None else f"numbers from 1 to --n, {n}"
        raise UsageError(f"eval: --k: expected {expected}, got {', '.join(map(str, k)) or 'none'}")
    results: dict[str, Any] = {}
    with bars() as tell:
        if data and model is not None:
            decoder, tokenizer = load_model(model, dtype=getattr(torch, dtype)), Tokenizer.from_folder(model)
            results["loss"] = _held_out_loss(model, weights, group_size, decoder, tokenizer, data, fields or {}, tell)
        if tasks is not None:
            from fastsft.synthesis.draw import DrawOptions
            from fastsft.verbs.scoring import Scoring, pass_at

            options = DrawOptions(n, temperature, top_p, max_tokens, seed, completion, stop, dtype, seconds, device)
            workers = workers or os.cpu_count() or 1
            scoring = Scoring(model, tasks, samples, output, languages, k, workers, options, speculation)
            results["tasks"] = pass_at(scoring, tell)
    if json:
        print_json(results)
    else:
        _show(results, asked=samples is None and not completion)


def _held_out_loss(
    model: Path,
    weights: Sequence[str],
    group_size: int,
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
    found = {**dataclasses.asdict(result), "samples": len(store), **report}
    if weights:
        from fastsft.verbs.weight_loss import losses_by_format

        found["weights"] = losses_by_format(model, store, weights, group_size=group_size, capacity=CAPACITY, tell=tell)
    return found


def _show(results: dict[str, Any], *, asked: bool) -> None:
    """``asked``: the tasks' prompts were users' messages."""
    from fastsft.data.notices import notices

    if loss := results.get("loss"):
        print(f"held-out loss {loss['loss']:.4f} over {loss['tokens']} tokens of {loss['samples']} samples")
        for format, value in loss.get("weights", {}).items():
            print(f"weights in {format}: {value:.4f} ({value - loss['loss']:+.4f})")
        for line in notices(loss):
            print(line)
    if tasks := results.get("tasks"):
        how = ", asked as messages (--completion continues prompts)" if asked else ""
        for size, value in tasks["pass_at"].items():
            print(f"pass@{size} {value:.3f} over {len(tasks['tasks'])} tasks{how}")
        if tasks["failures"]:
            print(f"failures: {', '.join(f'{kind}: {count}' for kind, count in tasks['failures'].items())}")
        if failed := next((t for t in tasks["tasks"] if t["failure"]), None):
            print(f"failed, e.g. {failed['task_id']}: {failed['failure']}")
