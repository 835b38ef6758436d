"""Real data, four objectives, one budget: ``python bench/real_runs.py DATA --work DIR --name MACHINE``.

DATA holds gsm8k_train.jsonl and gsm8k_test.jsonl (github.com/openai/grade-school-math), nl2bash_messages.jsonl
(github.com/TellinaTool/nl2bash as chat messages) and python_programming_puzzles.json (puzzles/puzzles.json of
github.com/microsoft/PythonProgrammingPuzzles).

One base model, made from a config and trained as a language model on the training rows of all three and this machine's
Python sources, is tuned on each of them with each objective and seed: the same rows, steps, learning rate and start.
Reported: held-out loss (negative log-likelihood of the answers' tokens), and the share of held-out tasks that greedy
decoding solves: GSM8K by the number behind ####, NL2Bash by the same command, puzzles by running the answer in the
sandbox. Every run is a folder under DIR; what is finished there is not run again. Results go to
bench/results/MACHINE/real-runs.json and docs/real-runs.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import statistics
import sysconfig
from pathlib import Path
from typing import Any

import orjson

import fastsft
from fastsft.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
OBJECTIVES = ("nll", "dft", "pear_token", "asft")
TASKS = ("gsm8k", "nl2bash", "puzzles")
LENGTH = 384
BASE_STEPS, STEPS = 800, 120
CHECKED = 200  # held-out tasks, at most
INIT = {
    "model_type": "qwen2", "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}  # fmt: skip


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))


def held_out(key: str) -> bool:
    """About one in ten, by a hash: the variants of a row that have the key in common fall on one side."""
    return hashlib.blake2b(key.encode(), digest_size=4).digest()[0] < 26


def write_data(data: Path, folder: Path) -> None:
    """For each task NAME-train.jsonl and NAME-test.jsonl of prompts and completions, and the texts for the base."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {}
    questions = [
        [orjson.loads(line) for line in (data / f"gsm8k_{part}.jsonl").read_bytes().splitlines()]
        for part in ("train", "test")
    ]
    train, test = (
        [{"prompt": f"Question: {r['question']}\nAnswer:", "completion": f" {r['answer']}"} for r in rows]
        for rows in questions
    )
    parts["gsm8k"] = train, test
    commands: tuple[list[dict[str, Any]], list[dict[str, Any]]] = [], []
    for line in (data / "nl2bash_messages.jsonl").read_bytes().splitlines():
        ask, answer = (m["content"] for m in orjson.loads(line)["messages"])
        # By the command: many stand with several descriptions.
        commands[held_out(answer)].append({"prompt": f"# {ask}\n$", "completion": f" {answer}"})
    parts["nl2bash"] = commands
    puzzles: tuple[list[dict[str, Any]], list[dict[str, Any]]] = [], []
    for p in orjson.loads((data / "python_programming_puzzles.json").read_bytes()):
        if p["sol_bodies"]:
            head = f"{p['sat']}\n\n{p['sol_header']}\n{p['sol_docstring']}\n"
            row = {"prompt": head, "completion": p["sol_bodies"][0], "name": p["name"], "sat": p["sat"]}
            puzzles[held_out(p["name"].partition(":")[0])].append(row)
    parts["puzzles"] = puzzles
    texts = [{"text": r["prompt"] + r["completion"]} for train, _ in parts.values() for r in train]
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        source = file.read_text(errors="ignore")
        texts += [{"text": source[i : i + 1000]} for i in range(0, len(source), 1000)]
    for name, (train, test) in parts.items():
        write_rows(folder / f"{name}-train.jsonl", train)
        order = sorted(test, key=lambda r: hashlib.blake2b(r["prompt"].encode()).digest())
        write_rows(folder / f"{name}-test.jsonl", order[:CHECKED])
    write_rows(folder / "texts.jsonl", texts)


def base_config(work: Path, dtype: str) -> dict[str, Any]:
    return {
        "output": str(work / "base"),
        "model": {"init": INIT, "dtype": dtype},
        "tokenizer": {"train_vocab": 4096},
        "data": {"train": [str(work / "data" / "texts.jsonl")], "max_length": LENGTH, "dedup": {"mode": "exact"}},
        "optim": {"lr": 3e-3, "weight_decay": 0.1},
        "schedule": {"final": 0.1},
        "train": {"tokens_per_batch": 2048, "epochs": 100, "max_steps": BASE_STEPS, "eval_every": 200,
                  "save_every": 200},
    }  # fmt: skip


def tune_config(work: Path, task: str, objective: str, seed: int, dtype: str) -> dict[str, Any]:
    return {
        "output": str(work / f"{task}-{objective}-{seed}"),
        "seed": seed,
        "model": {"path": str(work / "base" / "model"), "dtype": dtype},
        "data": {
            "train": [str(work / "data" / f"{task}-train.jsonl")], "eval": [str(work / "data" / f"{task}-test.jsonl")],
            "max_length": LENGTH, "format": "prompt_completion",
        },
        "objective": {"name": objective},
        "optim": {"lr": 1e-3},
        "train": {"tokens_per_batch": 2048, "epochs": 100, "max_steps": STEPS, "eval_every": STEPS // 4,
                  "save_every": 0, "keep": 1},
    }  # fmt: skip


def solved(model: Path, task: str, test: Path) -> float:
    """Share of held-out tasks that greedy decoding solves."""
    rows = [orjson.loads(line) for line in test.read_bytes().splitlines()]
    stop = {"gsm8k": ["\nQuestion:"], "nl2bash": ["\n"], "puzzles": ["\ndef ", "\nclass ", "\n#"]}[task]
    llm = fastsft.LLM(model)
    rows = [r for r in rows if len(llm.tokenizer.encode(r["prompt"])) + 200 <= INIT["max_position_embeddings"]]
    params = fastsft.SamplingParams(temperature=0.0, max_tokens=200, stop=tuple(stop))
    answers = [out.outputs[0].text for out in llm.generate([r["prompt"] for r in rows], params, progress=False)]
    if task == "puzzles":
        from fastsft.verify.passk import evaluate_tasks
        from fastsft.verify.tasks import Task

        names = "from typing import *\nimport math, random, re, itertools, collections\n"
        tasks = [Task(r["name"], "", "assert sat(sol()) is True", names + r["prompt"]) for r in rows]
        return evaluate_tasks(tasks, [[a] for a in answers], workers=1).pass_at[1]
    if task == "gsm8k":

        def final(text: str) -> str:
            return text.rpartition("####")[2].strip().replace(",", "") if "####" in text else ""

        right = [final(a) == final(r["completion"]) != "" for a, r in zip(answers, rows, strict=True)]
    else:
        right = [a.strip() == r["completion"].strip() for a, r in zip(answers, rows, strict=True)]
    return sum(right) / len(right)


def one(job: tuple[Path, str, str, int, str]) -> dict[str, Any]:
    """Tune and check; the row of the table."""
    work, task, objective, seed, dtype = job
    import torch

    torch.set_num_threads(1)
    config = tune_config(work, task, objective, seed, dtype)
    done = Path(config["output"]) / "row.json"
    if done.is_file():
        return dict(json.loads(done.read_text()))
    result = fastsft.train(config, progress=False)
    lines = read_metrics(Path(config["output"]) / "metrics.jsonl")
    assert result.eval_before
    assert result.eval_after
    row = {
        "task": task, "objective": objective, "seed": seed, "loss_before": result.eval_before.loss,
        "loss_after": result.eval_after.loss,
        "solved": solved(result.model_path, task, work / "data" / f"{task}-test.jsonl"),
        "held_out": [[m["step"], m["loss"]] for m in lines if m["kind"] == "eval"],
        "seconds": sum(m["seconds"] for m in lines if m["kind"] == "step"),
        "tokens": sum(m["tokens"] for m in lines if m["kind"] == "step"),
    }  # fmt: skip
    done.write_text(json.dumps(row))
    return row


def table(rows: list[dict[str, Any]], before: dict[str, float], tasks: list[str]) -> str:
    def spread(values: list[float], digits: int) -> str:
        deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{deviation}"

    lines = ["| data | objective | held-out loss | solved |", "|---|---|---|---|"]
    for task in tasks:
        mine = [r for r in rows if r["task"] == task]
        lines.append(f"| {task} | before tuning | {mine[0]['loss_before']:.3f} | {before[task]:.3f} |")
        for objective in OBJECTIVES:
            group = [r for r in mine if r["objective"] == objective]
            losses, shares = [r["loss_after"] for r in group], [r["solved"] for r in group]
            lines.append(f"| {task} | `{objective}` | {spread(losses, 3)} | {spread(shares, 3)} |")
    return "\n".join(lines)


PAGE = """# Objectives on real data

Written by `bench/real_runs.py` from [its results](../bench/results/{name}/real-runs.json). One model of
{parameters:.1f} M parameters, trained from nothing on the training rows of GSM8K, NL2Bash and Python Programming
Puzzles and on Python sources ({base_steps} steps), is tuned on each set with each objective under one budget: {steps}
steps of up to 2,048 tokens, AdamW at 1e-3 with cosine decay, the same rows. Held-out loss: negative log-likelihood of
the answers' tokens in nats. Solved: share of {checked} held-out tasks (fewer where prompts are too long) that greedy
decoding solves: GSM8K by the final number, NL2Bash by the very same command, puzzles by running the answer. Mean and
standard deviation over {seeds} seeds (the order of the rows).

{table}

The reference of `pear_token` and `asft` is the model before tuning, so `pear_token` begins as `nll` does. `dft` and
`asft` weigh each token by its probability: from a model that knows little they sharpen what it knows and let the rest
go, so their held-out loss rises; they are meant for strong models and small steps. What such a small model can show
is the effect on the loss; the tasks are far beyond it.

![Held-out loss](real-runs.svg)
"""


def page(result: dict[str, Any]) -> str:
    rows = result["rows"]
    return PAGE.format(
        name=result["name"], parameters=result["parameters"] / 1e6, base_steps=BASE_STEPS, steps=STEPS, checked=CHECKED,
        seeds=len({r["seed"] for r in rows}), table=table(rows, result["before"], [*TASKS]),
    )  # fmt: skip


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "fastsft"
    figure, axes = plt.subplots(1, len(TASKS), figsize=(4 * len(TASKS), 3), squeeze=False)
    for task, axis in zip(TASKS, axes[0], strict=True):
        for objective in OBJECTIVES:
            curves = [r["held_out"] for r in rows if r["task"] == task and r["objective"] == objective]
            steps = [step for step, _ in curves[0]]
            axis.plot(steps, [statistics.mean(c[i][1] for c in curves) for i in range(len(steps))], label=objective)
        axis.set(title=task, xlabel="step", ylabel="held-out loss")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--name", required=True, help="folder under bench/results")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    work = options.work.resolve()
    if not (work / "data" / "texts.jsonl").exists():
        write_data(options.data, work / "data")
    os.environ["FASTSFT_NUM_THREADS"] = "1"
    base = fastsft.train(base_config(work, options.dtype))
    jobs = [
        (work, task, objective, seed, options.dtype)
        for seed in range(options.seeds) for task in TASKS for objective in OBJECTIVES
    ]  # fmt: skip
    rows = []
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for row in pool.imap(one, jobs):
            rows.append(row)
            print(f"{row['task']:8} {row['objective']:11} seed {row['seed']}: {row['loss_before']:.4f} -> "
                  f"{row['loss_after']:.4f}, solved {row['solved']:.3f}", flush=True)  # fmt: skip
    before = {task: solved(base.model_path, task, work / "data" / f"{task}-test.jsonl") for task in TASKS}
    import torch

    from fastsft.models.weights import load_model

    model = load_model(base.model_path, dtype=torch.float32)
    result = {
        "name": options.name, "parameters": sum(p.numel() for p in model.parameters()), "torch": torch.__version__,
        "dtype": options.dtype, "before": before, "rows": rows,
    }  # fmt: skip
    assert all(math.isfinite(r["loss_after"]) for r in rows)
    folder = ROOT / "bench" / "results" / options.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "real-runs.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(rows, ROOT / "docs" / "real-runs.svg")
    (ROOT / "docs" / "real-runs.md").write_text(page(result))


if __name__ == "__main__":
    main()
