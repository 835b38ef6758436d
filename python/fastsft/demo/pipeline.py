"""The demo's stages, end to end: source files, dedup, tokenizer, training, tuning, execution, samples, report."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch

import fastsft
from fastsft.config import Config, load_config
from fastsft.data.loader import PackedLoader
from fastsft.data.prepare import Prepared, prepare
from fastsft.demo import baseline, corpus, tasks
from fastsft.engine.llm import LLM
from fastsft.engine.request import SamplingParams
from fastsft.models.weights import load_model
from fastsft.report.html import write_report
from fastsft.train.metrics import read_metrics
from fastsft.train.trainer import Trainer, TrainResult
from fastsft.verify.passk import PassReport, evaluate_tasks
from fastsft.verify.tasks import Task


@dataclass(frozen=True)
class Size:
    """How much of everything. Fixed numbers, so that two runs on one machine are the same run."""

    definitions: int | None
    vocab: int
    hidden: int
    layers: int
    train_steps: int
    tune_steps: int
    tasks: int
    pairs: int
    held_out_tasks: int
    rounds: int


# The tuned model learns to copy names and numbers from its prompt all at once, somewhere between steps 200 and 400,
# as seed and rounding have it.
FULL = Size(definitions=None, vocab=6144, hidden=256, layers=6, train_steps=340, tune_steps=540, tasks=12000, pairs=300,
            held_out_tasks=160, rounds=5)  # fmt: skip
QUICK = Size(definitions=1500, vocab=1024, hidden=64, layers=2, train_steps=8, tune_steps=12, tasks=300, pairs=100,
             held_out_tasks=8, rounds=1)  # fmt: skip
CAPACITY = 2048  # tokens per step
HEADS, KV_HEADS = 8, 2
PADDED_ROWS = 16  # documents per batch of the padded loop
CODE = "code.jsonl"  # the first file a demo writes, and so the mark of its folder


def run_demo(output: Path, *, quick: bool) -> dict[str, Any]:
    """Run every stage under ``output`` and return what results.json holds.

    The compute type is bfloat16 where the CPU multiplies it natively, float32 elsewhere. An earlier demo in ``output``
    is removed first.

    Raises:
        ValueError: ``output`` has something else in it.
    """
    _clear(output)
    demo = _Demo(output, QUICK if quick else FULL)
    demo.read_sources()
    demo.train_on_code()
    demo.tune_on_instructions()
    demo.execute()
    demo.sample_and_time()
    return demo.report()


class _Demo:
    """The stages in their order; each leaves its part in ``results``, and what later ones need in an attribute."""

    def __init__(self, output: Path, size: Size) -> None:
        self.output, self.size = output, size
        self.dtype = "bfloat16" if _native_bfloat16() else "float32"
        self.stages = _Stages()
        self.results: dict[str, Any] = {"info": fastsft.info(), "size": dataclasses.asdict(size), "dtype": self.dtype,
                                        "torch_threads": torch.get_num_threads()}  # fmt: skip

    def read_sources(self) -> None:
        with self.stages("source files"):
            self.found = corpus.definitions(limit=self.size.definitions)
            _write_jsonl(self.output / CODE, ({"text": d.text, "path": d.source} for d in self.found))
            characters = sum(len(d.text) for d in self.found)
            self.results["corpus"] = {"definitions": len(self.found), "characters": characters}
            self.stages.say(f"{len(self.found)} functions and classes of the standard library")

    def train_on_code(self) -> None:
        with self.stages("dedup, tokenizer, tokens"):
            config = _train_config(self.output, self.size, self.dtype)
            self.prepared = prepare(config)
            self.results["prepare"] = self.prepared.report
            _say_dedup(self.stages, self.prepared.report["dedup"])
        with self.stages("training on code with fill-in-the-middle"):
            trained = Trainer(config, prepared=self.prepared).run()
            self.base = trained.model_path
            self.results["train"] = _summary(trained, self.output / "base")
            parameters = sum(p.numel() for p in load_model(self.base).parameters())
            self.results["parameters"] = parameters
            speed = self.results["train"]["tokens_per_second"]
            self.stages.say(f"{parameters / 1e6:.1f} M parameters, {speed:,.0f} tokens/s ({self.dtype})")

    def tune_on_instructions(self) -> None:
        with self.stages("tuning on instructions"):
            conversations, self.held_out, _ = tasks.build(self.size.tasks, self.size.held_out_tasks, seed=0)
            pairs = corpus.instruction_pairs(self.found)[: self.size.pairs]
            _write_jsonl(self.output / "instructions.jsonl", ({"messages": m} for m in [*conversations, *pairs]))
            tuned = Trainer(_tune_config(self.output, self.size, self.dtype, self.base)).run()
            self.tuned = tuned.model_path
            self.results["tune"] = _summary(tuned, self.output / "tuned")
            self.results["instructions"] = {"tasks": len(conversations), "from_docstrings": len(pairs)}

    def execute(self) -> None:
        with self.stages("held-out tasks, executed in the sandbox"):
            self.results["pass_at_1"] = {}
            for name, path in (("before", self.base), ("after", self.tuned)):
                report, answers = _solve(path, self.held_out)
                self.results["pass_at_1"][name] = report.to_dict()
                self.stages.say(f"pass@1 {name} tuning: {report.pass_at[1]:.2f} of {len(self.held_out)} tasks")
            self.results["answers"] = _some(self.held_out, answers, report)
            self.results["layers"] = list(report.tasks[0].results[0].layers)

    def sample_and_time(self) -> None:
        with self.stages("samples"):
            self.results["samples"] = _samples(self.base, self.prepared)
        with self.stages("speed against a padded PyTorch loop"):
            comparison = _compare(self.base, self.prepared, self.dtype, self.size)
            speed = {**dataclasses.asdict(comparison), "ratio": comparison.ratio, "rows": PADDED_ROWS}
            self.results["speed"] = speed
            self.stages.say(
                f"{comparison.ours:,.0f} against {comparison.padded:,.0f} tokens/s: {comparison.ratio:.2f}x "
                f"({comparison.padding_share:.0%} of the padded batch is padding)"
            )

    def report(self) -> dict[str, Any]:
        """Write results.json and the HTML report."""
        self.results["seconds"] = dict(self.stages.seconds)
        self.results["total_seconds"] = sum(self.stages.seconds.values())
        with self.stages("report"):
            (self.output / "results.json").write_text(json.dumps(self.results, indent=2) + "\n")
            path = write_report(self.output, self.results, read_metrics(self.output / "base" / "metrics.jsonl"),
                                read_metrics(self.output / "tuned" / "metrics.jsonl"))  # fmt: skip
        _say_results(self.stages, self.results, path)
        return self.results


def _clear(output: Path) -> None:
    """Make ``output`` an empty folder; only what a demo wrote is ever removed."""
    if output.exists() and not (output.is_dir() and ((output / CODE).is_file() or not any(output.iterdir()))):
        raise ValueError(f"demo: output: expected a new or empty folder or that of an earlier demo, got {output}")
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)


class _Stages:
    """Names each stage, times it, and prints what it found."""

    def __init__(self) -> None:
        from rich.console import Console

        self.seconds: dict[str, float] = {}
        self._console = Console(stderr=True)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._console.rule(f"[bold]{name}", align="left")
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began
        self._console.print(f"[dim]{self.seconds[name]:.1f} s")

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        from rich.table import Table

        table = Table(*columns, title=title)
        for row in rows:
            table.add_row(*row)
        self._console.print(table, markup=False)


def _native_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _train_config(output: Path, size: Size, dtype: str) -> Config:
    # Qwen3, whose normalised queries and keys let so small a model learn within minutes to copy from its prompt.
    architecture = {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": size.hidden,
        "intermediate_size": 3 * size.hidden, "num_hidden_layers": size.layers, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": 32, "tie_word_embeddings": True, "max_position_embeddings": 2048,
    }  # fmt: skip
    return load_config(
        {
            "output": str(output / "base"),
            "model": {"init": architecture, "dtype": dtype},
            "tokenizer": {"train_vocab": size.vocab},
            "data": {
                "train": [str(output / CODE)], "max_length": 1024, "eval_fraction": 0.01,
                "dedup": {"mode": "near", "threshold": 0.7}, "fim": {"rate": 0.5},
            },
            "optim": {"lr": 2e-3, "weight_decay": 0.1},
            "schedule": {"warmup": 0.05, "final": 0.1},
            "train": {"tokens_per_batch": CAPACITY, "epochs": 100, "max_steps": size.train_steps, "eval_every": 120,
                      "save_every": 0},
        }
    )  # fmt: skip


def _tune_config(output: Path, size: Size, dtype: str, base: Path) -> Config:
    return load_config(
        {
            "output": str(output / "tuned"),
            "model": {"path": str(base), "dtype": dtype},
            "data": {"train": [str(output / "instructions.jsonl")], "max_length": 1024, "eval_fraction": 0.02},
            "optim": {"lr": 2e-3},
            "schedule": {"warmup": 0.05},
            "train": {"tokens_per_batch": CAPACITY, "epochs": 100, "max_steps": size.tune_steps, "eval_every": 120,
                      "save_every": 0},
        }
    )  # fmt: skip


def _summary(result: TrainResult, folder: Path) -> dict[str, Any]:
    before, after = result.eval_before, result.eval_after
    return {
        "steps": result.steps,
        "tokens_per_second": result.tokens_per_second,
        "loss_before": before.loss if before else None,
        "loss_after": after.loss if after else None,
        "tokens": sum(m["tokens"] for m in read_metrics(folder / "metrics.jsonl") if m["kind"] == "step"),
    }


def _solve(path: Path, held_out: list[Task]) -> tuple[PassReport, list[str]]:
    llm = LLM(path)
    params = SamplingParams(max_tokens=64)
    outputs = llm.chat([[{"role": "user", "content": t.prompt}] for t in held_out], params)
    answers = [o.outputs[0].text for o in outputs]
    return evaluate_tasks(held_out, [[a] for a in answers], workers=os.cpu_count() or 1), answers


def _some(tasks: list[Task], answers: list[str], report: PassReport, each: int = 6) -> list[dict[str, Any]]:
    """A few that passed, then a few that failed."""
    every = [
        {"prompt": t.prompt, "answer": a, "passed": bool(r.passed)}
        for t, a, r in zip(tasks, answers, report.tasks, strict=True)
    ]
    return [a for passed in (True, False) for a in [x for x in every if x["passed"] is passed][:each]]


def _samples(path: Path, prepared: Prepared) -> dict[str, list[dict[str, str]]]:
    """Completions and infills by the model that was trained on code, for held-out documents that fit a page."""
    llm = LLM(path)
    completions: list[dict[str, str]] = []
    infills: list[dict[str, str]] = []
    for i in range(len(prepared.eval)):
        text = prepared.tokenizer.decode(prepared.eval[i].ids.tolist(), skip_special_tokens=False)
        if "<|fim_" in text or not 6 <= text.count("\n") <= 20:
            continue
        lines = text.replace("<|endoftext|>", "").splitlines(keepends=True)
        half = len(lines) // 2
        draw: dict[str, Any] = {"max_tokens": 60, "temperature": 0.7, "top_p": 0.9, "seed": i}
        if len(completions) < 3:
            prompt = "".join(lines[:half])
            output = llm.generate(prompt, SamplingParams(min_tokens=8, **draw))[0].outputs[0].text
            completions.append({"prompt": prompt, "output": output, "reference": "".join(lines[half:])})
        if len(infills) < 3 and lines[half].strip() and '"""' not in text:  # a line of code, not of prose
            prefix, suffix = "".join(lines[:half]), "".join(lines[half + 1 :])
            written = llm.infill(prefix, suffix, SamplingParams(stop="\n", **draw), order="spm").outputs[0].text
            infills.append({"prefix": prefix, "suffix": suffix, "output": written + "\n", "reference": lines[half]})
    return {"completions": completions, "infills": infills}


def _compare(path: Path, prepared: Prepared, dtype: str, size: Size) -> baseline.Comparison:
    model = load_model(path, dtype=getattr(torch, dtype))
    loader = PackedLoader(prepared.train, capacity=CAPACITY, seed=1)
    batches = [loader.batch(0, i) for i in range(2)]
    return baseline.compare(model, batches, rows=PADDED_ROWS, rounds=size.rounds)


def _say_dedup(stages: _Stages, report: dict[str, Any]) -> None:
    stages.say(
        f"{report['kept']} of {report['records']} kept; {report['exact_duplicates']} exact and "
        f"{report['near_duplicates']} near duplicates"
    )
    rows = [[str(c["size"]), c["example"].partition("\n")[0][:60], ", ".join(Path(s).name for s in c["sources"][:3])]
            for c in report["clusters"][:5]]  # fmt: skip
    stages.table("largest clusters", ["size", "first line", "members"], rows)


def _say_results(stages: _Stages, results: dict[str, Any], report: Path) -> None:
    train, tune, passed, speed = results["train"], results["tune"], results["pass_at_1"], results["speed"]
    rows = [
        ["held-out loss on code, nats", f"{train['loss_before']:.3f}", f"{train['loss_after']:.3f}"],
        ["held-out loss on instructions, nats", f"{tune['loss_before']:.3f}", f"{tune['loss_after']:.3f}"],
        ["pass@1 on held-out tasks", *(f"{passed[k]['pass_at']['1']:.2f}" for k in ("before", "after"))],
        ["tokens/s: padded loop, fastsft", f"{speed['padded']:,.0f}", f"{speed['ours']:,.0f}"],
    ]
    stages.table(f"done in {results['total_seconds']:.0f} s", ["", "before", "after"], rows)
    stages.say(f"report: {report}")


def _write_jsonl(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with open(path, "wb") as stream:
        for row in rows:
            stream.write(orjson.dumps(row) + b"\n")
