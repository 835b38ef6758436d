"""What each verb of the command line does: a function whose arguments become its flags.

Heavy imports sit inside the functions, so that help is quick.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.progress import Progress

    from fastsft.config import Config


class UsageError(ValueError):
    """Input the user can mend; shown without a traceback."""


def info(*, json: bool = False) -> None:
    """Show what is built, what was found, and which implementation serves each op.

    Args:
        json: machine-readable output.
    """
    import fastsft

    found = fastsft.info()
    if json:
        _print_json(found)
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    cpu, cuda = found["cpu"], found["cuda"]
    console.print(f"fastsft {found['fastsft']}, Python {found['python']}, {found['platform']}", highlight=False)
    console.print(
        f"CPU: {cpu['isa_active']} of {', '.join(cpu['isa_available'])}; {cpu['threads']} of {cpu['cores']} cores",
        highlight=False,
    )
    built = f"kernels for {cuda['built_for']}" if cuda["built_for"] else "not in this build"
    console.print(f"CUDA: {built}; {cuda['devices']} devices; torch's CUDA {cuda['torch']}", highlight=False)
    packages = (f"{name} {version or '-'}" for name, version in found["packages"].items())
    console.print(f"Packages: {', '.join(packages)}", highlight=False)
    table = Table("op", "CPU", "CUDA", title="who serves what")
    for op, where in found["ops"].items():
        table.add_row(
            op, *(f"{where[d]['kind']}: {where[d]['reason']}" if d in where else "-" for d in ("cpu", "cuda"))
        )
    console.print(table)


def demo(*, output: str = "runs/demo", quick: bool = False, json: bool = False) -> None:
    """Train, tune, execute and sample a small code model on this machine's own Python library.

    Args:
        output: folder for the run and its report.
        quick: a shortened form, for checking that everything works.
        json: print results.json at the end.
    """
    from fastsft.demo.pipeline import run_demo

    results = run_demo(Path(output), quick=quick)
    if json:
        _print_json(results)


def dedup(
    source: str,
    /,
    *,
    output: str | None = None,
    report: str | None = None,
    threshold: float = 0.7,
    num_perm: int = 128,
    ngram: int = 5,
    unit: Literal["word", "char"] = "word",
    mode: Literal["near", "exact"] = "near",
    on_bad: Literal["fail", "skip"] = "fail",
    json: bool = False,
) -> None:
    """Find exact and near duplicates in a JSONL, Parquet or datasets source; keep the first of each cluster.

    Args:
        source: JSONL(.gz) or Parquet file, or a datasets folder.
        output: write the kept lines here, byte for byte (JSONL sources).
        report: write clusters and counts here, as JSON.
        threshold: estimated Jaccard similarity from which two texts are near duplicates.
        num_perm: hash functions per signature.
        ngram: words or characters per shingle.
        unit: of what shingles are made.
        mode: near (includes exact) or exact only.
        on_bad: a broken row stops the command, or is counted and left out.
        json: machine-readable summary.
    """
    from fastsft.data.dedup import dedup as find
    from fastsft.data.dedup import dedup_file
    from fastsft.data.records import Problems, read_records

    problems = Problems(on_bad)
    options: dict[str, Any] = {
        "threshold": threshold, "num_perm": num_perm, "ngram": ngram, "unit": unit, "mode": mode,
    }  # fmt: skip
    with _progress() as bar:
        if output is not None:
            found = dedup_file(source, output, problems, progress=_reporter(bar), **options)
        else:
            found = find(list(read_records([source], problems)), progress=_reporter(bar), **options)
    summary = {**found.to_dict(), "skipped": dict(problems.counts)}
    if report is not None:
        _write_text(Path(report), _dumps(summary))
    if json:
        _print_json(summary)
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False)  # the texts are the user's
    console.print(
        f"{summary['records']} records: {summary['kept']} kept, {found.exact_duplicates} exact and "
        f"{found.near_duplicates} near duplicates"
    )
    table = Table("size", "members", "begins with", title="largest clusters")
    for cluster in summary["clusters"][:10]:
        table.add_row(
            str(cluster["size"]), "\n".join(Path(s).name for s in cluster["sources"][:3]), cluster["example"][:80]
        )
    console.print(table)


def prepare(config: Config, *, show: int = 0, json: bool = False) -> None:
    """Read, check, tokenise, mask and store the data of a run, and report what was left out.

    Args:
        show: print this many samples with the trained tokens coloured.
        json: machine-readable report.
    """
    import fastsft

    with _progress() as bar:
        prepared = fastsft.prepare(config, progress=_reporter(bar))
    if json:
        _print_json(prepared.report)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(markup=False)
    for name in ("train", "eval"):
        part = prepared.report[name]
        console.print(f"{name}: {part['samples']} samples, {part['tokens']} tokens, {part['trained_tokens']} trained")
    for reason, count in prepared.report["skipped"].items():
        console.print(f"{count} x {reason}, e.g. {prepared.report['skipped_examples'][reason][0]}")
    for i in range(min(show, len(prepared.train))):
        sample = prepared.train[i]
        text = Text()
        for token, weight in zip(sample.ids.tolist(), sample.weights.tolist(), strict=True):
            text.append(prepared.tokenizer.decode([token], False), style="black on green" if weight > 0 else "dim")
        console.print(f"\n{sample.source}", style="bold")
        console.print(text)


def train(config: Config, *, json: bool = False) -> None:
    """Run a configuration, or go on where it stopped.

    Args:
        json: machine-readable result on the last line.
    """
    import fastsft

    result = fastsft.train(config)
    if json:
        _print_json({**dataclasses.asdict(result), "model_path": str(result.model_path)})
        return
    before, after = result.eval_before, result.eval_after
    losses = f"; held-out loss {before.loss:.4f} -> {after.loss:.4f}" if before and after else ""
    print(f"{result.steps} steps, {result.tokens_per_second:,.0f} tokens/s{losses}\nmodel: {result.model_path}")


def generate(
    model: str,
    /,
    *,
    prompt: str | None = None,
    chat: str | None = None,
    infill: tuple[str, str] | None = None,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    n: int = 1,
    stop: tuple[str, ...] = (),
    dtype: Literal["float32", "bfloat16"] = "float32",
    json: bool = False,
) -> None:
    """Continue a prompt, answer a message, or fill in the middle.

    Args:
        model: folder with config.json, weights and tokenizer.
        prompt: text to continue.
        chat: a user message, written out by the model's chat template.
        infill: prefix and suffix; the model writes what is between them.
        max_tokens: most tokens to generate.
        temperature: 0 is greedy.
        top_k: draw among this many tokens; 0 is all.
        top_p: draw among the most probable tokens that have this share together.
        seed: makes a draw repeatable.
        n: continuations.
        stop: strings that end the text.
        dtype: of weights and cache.
        json: machine-readable output.
    """
    import torch

    import fastsft

    if sum(x is not None for x in (prompt, chat, infill)) != 1:
        raise UsageError("generate: give exactly one of --prompt, --chat and --infill")
    params = fastsft.SamplingParams(
        n=n, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop, max_tokens=max_tokens
    )
    llm = fastsft.LLM(model, dtype=getattr(torch, dtype))
    if infill is not None:
        result = llm.infill(*infill, params)
    elif chat is not None:
        result = llm.chat([{"role": "user", "content": chat}], params)[0]
    else:
        result = llm.generate(str(prompt), params)[0]
    if json:
        _print_json(dataclasses.asdict(result))
        return
    for output in result.outputs:
        print(output.text if n == 1 else f"--- {output.index} ({output.finish_reason})\n{output.text}")


def evaluate(
    model: str,
    /,
    *,
    data: tuple[str, ...] = (),
    tasks: str | None = None,
    k: tuple[int, ...] = (1,),
    n: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    max_tokens: int = 256,
    completion: bool = False,
    fields: dict[str, str] | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    json: bool = False,
) -> None:
    """Loss on held-out data, and pass@k on tasks whose answers are executed in a sandbox.

    Args:
        model: folder with config.json, weights and tokenizer.
        data: held-out files, in the formats of training data.
        tasks: JSONL(.gz) of tasks: task_id, prompt, check; or HumanEval's fields.
        k: pass@k for each of these.
        n: samples per task, at least the largest k.
        temperature: 0 is greedy.
        seed: of the draws.
        max_tokens: most tokens per sample.
        completion: continue the prompt as it is, not as a chat message.
        fields: names used in the files, as in data.fields of a run.
        dtype: of weights and cache.
        json: machine-readable output.
    """
    import torch

    from fastsft.engine.llm import LLM
    from fastsft.engine.request import SamplingParams
    from fastsft.models.tokenizer import Tokenizer
    from fastsft.models.weights import load_model

    if not data and tasks is None:
        raise UsageError("eval: give --data, --tasks or both")
    decoder, tokenizer = load_model(model, dtype=getattr(torch, dtype)), Tokenizer.from_folder(model)
    results: dict[str, Any] = {}
    if data:
        results["loss"] = _held_out_loss(decoder, tokenizer, model, data, fields or {})
    if tasks is not None:
        from fastsft.verify.passk import evaluate_tasks, extract_code, read_tasks

        listed = read_tasks(tasks)
        params = SamplingParams(n=n, temperature=temperature, seed=seed, max_tokens=max_tokens)
        llm = LLM(decoder, tokenizer)
        if completion:
            outputs = llm.generate([t.prompt for t in listed], params)
        else:
            outputs = llm.chat([[{"role": "user", "content": t.prompt}] for t in listed], params)
        samples = [[o.text if completion else extract_code(o.text) for o in r.outputs] for r in outputs]
        results["tasks"] = evaluate_tasks(listed, samples, k=k).to_dict()
    if json:
        _print_json(results)
        return
    if "loss" in results:
        print(f"held-out loss {results['loss']['loss']:.4f} over {results['loss']['tokens']} tokens")
    for size, value in results.get("tasks", {}).get("pass_at", {}).items():
        print(f"pass@{size} {value:.3f} over {len(results['tasks']['tasks'])} tasks {results['tasks']['statuses']}")


def _held_out_loss(decoder: Any, tokenizer: Any, model: str, data: tuple[str, ...], fields: dict[str, str]) -> Any:
    from fastsft.config import load_config
    from fastsft.data.prepare import tokenise
    from fastsft.data.records import Problems, read_records
    from fastsft.data.store import SampleStore
    from fastsft.train.evaluate import evaluate_loss

    config = load_config({"model": {"path": model}, "data": {"train": list(data), "fields": fields}})
    problems = Problems("fail")
    records = list(read_records(data, problems, fields=fields))
    store = SampleStore.from_samples(tokenise(records, tokenizer, config, problems))
    result = evaluate_loss(decoder, store, capacity=config.train.tokens_per_batch)
    if result is None:
        raise UsageError(f"eval: {', '.join(data)}: no usable row")
    return {**dataclasses.asdict(result), "samples": len(store), "skipped": dict(problems.counts)}


# verb -> (function, does it take a run configuration)


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _reporter(bar: Progress) -> Callable[[str, int, int], None]:
    """(stage, done, total) -> one bar per stage; a total of 0 is unknown."""
    tasks: dict[str, Any] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=total or None)
        bar.update(tasks[stage], completed=done, total=total or None)

    return report


def _write_text(path: Path, text: str) -> None:
    stage = path.with_name(f".{path.name}.tmp")
    stage.write_text(text, encoding="utf-8")
    stage.replace(path)


def _dumps(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _print_json(value: Any) -> None:
    print(_dumps(value), end="")
