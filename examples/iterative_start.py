"""What examples/iterative.toml starts from: tasks that can be checked, and a small model that solves some of them.

    python examples/iterative_start.py          # into runs/iterative, in about a minute on two CPU cores

The tasks ask for one-line functions over names and constants. No task is in the rows that the model is trained on, and
no held-out task is among those that it will be sampled on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fastsft
from fastsft.demo import tasks


def main(folder: Path = Path("runs/iterative"), *, seed: int = 0, rows: int = 2000, sampled: int = 200,
         held_out: int = 100, hidden: int = 128, layers: int = 4, steps: int = 300) -> Path:  # fmt: skip
    """Write tasks.jsonl, held_out.jsonl and start/model under ``folder``; returns the model."""
    conversations, made, _ = tasks.build(rows, sampled + held_out, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "start.jsonl", ({"messages": turns} for turns in conversations))
    for name, chosen in (("tasks.jsonl", made[:sampled]), ("held_out.jsonl", made[sampled:])):
        write(folder / name, ({k: v for k, v in dataclasses.asdict(t).items() if v} for t in chosen))
    architecture = {
        "model_type": "qwen3", "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True,
        "max_position_embeddings": 512,
    }  # fmt: skip
    result = fastsft.train(
        {
            "output": str(folder / "start"),
            "seed": seed,
            "model": {"init": architecture, "dtype": "float32"},
            "tokenizer": {"train_vocab": 600},
            "data": {"train": [str(folder / "start.jsonl")], "max_length": 256, "weights": {"prompt": 0.3}},
            "optim": {"lr": 3e-3, "weight_decay": 0.1},
            "schedule": {"warmup": 0.05, "final": 0.1},
            "train": {"tokens_per_batch": 2048, "epochs": 100, "max_steps": steps, "eval_every": 0, "save_every": 0},
        }
    )
    return result.model_path


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    print(main())
