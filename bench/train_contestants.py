"""A contestant of ``bench_train.py``, in a process of its own:
``python bench/train_contestants.py CONTESTANT SIZE VOCABULARY DTYPE FOLDER STEPS``.

FOLDER holds the model. Every step trains on the same documents. What is printed last is a line of JSON: the seconds and
the loss of each step, and the memory that the process took at its peak beyond its imports.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from train_case import BETAS, CLIP, EPSILON, LEARNING_RATE, Case, documents


@dataclass
class Steps:
    """``peak`` is the process's at its end, in bytes, ``imported`` that with its imports alone."""

    seconds: list[float]
    losses: list[float]
    imported: int
    peak: int = 0


def peak() -> int:
    """Of this program alone: ru_maxrss would begin at the size of the process that started it."""
    gc.collect()
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


# --- fastsft ----------------------------------------------------------------------------------------------------------


def with_fastsft(case: Case, folder: Path, steps: int) -> Steps:
    """``fastsft train`` on samples that are tokenised already: an epoch is one batch."""
    import numpy as np

    from fastsft._C import keep_freed_memory
    from fastsft.data.batch import Sample
    from fastsft.data.prepare import Prepared
    from fastsft.data.store import SampleStore
    from fastsft.models.tokenizer import Tokenizer
    from fastsft.train.metrics import read_metrics
    from fastsft.train.trainer import Trainer

    imported = peak()
    keep_freed_memory()  # as the command does
    samples = []
    for document in documents(case.config["vocab_size"]):
        weights = np.array([label != -100 for label in document.labels], np.float32)
        samples.append(Sample(np.array(document.ids, np.int32), weights))
    store = SampleStore.from_samples(samples)
    prepared = Prepared(
        store, SampleStore.from_samples([]), Tokenizer.train(["def f(x): return x"], 300), {"key": "bench"}
    )
    beta1, beta2 = BETAS
    with tempfile.TemporaryDirectory(prefix="fastsft-bench-") as output:
        config = {
            "output": output,
            "model": {"path": str(folder), "dtype": case.dtype},
            "optim": {
                "lr": LEARNING_RATE, "beta1": beta1, "beta2": beta2, "eps": EPSILON, "weight_decay": 0.0,
                "clip_norm": CLIP,
            },
            "schedule": {"kind": "constant"},
            "train": {"tokens_per_batch": store.num_tokens, "epochs": steps},
        }  # fmt: skip
        Trainer(config, prepared=prepared, progress=False).run()
        rows = [row for row in read_metrics(Path(output) / "metrics.jsonl") if row["kind"] == "step"]
    assert all(row["tokens"] == store.num_tokens for row in rows)
    return Steps([row["seconds"] for row in rows], [row["loss"] for row in rows], imported)


# --- TRL --------------------------------------------------------------------------------------------------------------


def with_trl(mode: str, plugged: bool, case: Case, folder: Path, steps: int) -> Steps:
    """Padded, padding-free or packed as best it can; no activation checkpointing, as in the others. ``plugged``: the
    same with fastsft's plug-in."""
    import datasets
    import transformers
    import trl

    trainer = trl.SFTTrainer
    if plugged:
        from fastsft.integrations.trl import SFTTrainer as trainer

    imported = peak()
    rows = documents(case.config["vocab_size"])
    data = datasets.Dataset.from_dict({"input_ids": [d.ids for d in rows], "labels": [d.labels for d in rows]})
    longest = max(len(d.ids) for d in rows)
    in_a_step = {"per_device_train_batch_size": len(rows), "max_length": None}
    if mode == "packed":
        # rows of the longest document one after the other: with all in one row the quadratic mask costs more
        packs = len(trl.pack_dataset(data, longest, "bfd"))
        in_a_step = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": packs, "max_length": longest}
    arguments = trl.SFTConfig(
        output_dir=tempfile.mkdtemp(prefix="fastsft-bench-"), packing=mode == "packed",
        padding_free=mode == "padding-free", use_cpu=True, bf16=case.dtype == "bfloat16", gradient_checkpointing=False,
        max_steps=steps, learning_rate=LEARNING_RATE, lr_scheduler_type="constant", adam_beta1=BETAS[0],
        adam_beta2=BETAS[1], adam_epsilon=EPSILON, weight_decay=0.0, max_grad_norm=CLIP, logging_steps=1,
        save_strategy="no", report_to="none", dataloader_pin_memory=False, disable_tqdm=True, **in_a_step,
    )  # fmt: skip
    found = Steps([], [], imported)

    class Watch(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.since = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.perf_counter()
            found.seconds.append(now - self.since)
            self.since = now

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                found.losses.append(float(logs["loss"]))

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainer(model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=[Watch()]).train()
    return found


# --- plain torch ------------------------------------------------------------------------------------------------------


def with_torch(masters: bool, case: Case, folder: Path, steps: int) -> Steps:
    import safetensors.torch
    from plain_decoder import PlainDecoder, PlainOptimizer

    imported = peak()
    decoder = PlainDecoder(safetensors.torch.load_file(folder / "model.safetensors"), case.config, case.torch_dtype)
    optimizer = PlainOptimizer(decoder, masters=masters, clip=CLIP, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON)
    rows = documents(case.config["vocab_size"])
    ids = torch.tensor([i for d in rows for i in d.ids])
    labels = torch.tensor([i for d in rows for i in [*d.labels[1:], -100]])
    found = Steps([], [], imported)
    for _ in range(steps):
        began = time.perf_counter()
        loss = decoder.loss(ids, [len(d.ids) for d in rows], labels)
        found.losses.append(loss.item())
        loss.backward()
        optimizer.step()
        found.seconds.append(time.perf_counter() - began)
    return found


CONTESTANTS: dict[str, Callable[[Case, Path, int], Steps]] = {
    "fastsft": with_fastsft,
    "TRL, padded": lambda *a: with_trl("padded", False, *a),
    "TRL, packed": lambda *a: with_trl("packed", False, *a),
    "TRL, padding-free": lambda *a: with_trl("padding-free", False, *a),
    "TRL with the plug-in, padded": lambda *a: with_trl("padded", True, *a),
    "TRL with the plug-in, packed": lambda *a: with_trl("packed", True, *a),
    "TRL with the plug-in, padding-free": lambda *a: with_trl("padding-free", True, *a),
    "torch": lambda case, *a: with_torch(case.dtype != "float32", case, *a),
    "torch, without float32 weights": lambda *a: with_torch(False, *a),
}

if __name__ == "__main__":
    name, size, vocabulary, dtype, folder, steps = sys.argv[1:]
    os.environ["HF_HUB_OFFLINE"] = "1"
    time.perf_counter = time.process_time  # fastsft reports its steps on the former; see bench_train.py
    found = CONTESTANTS[name](Case(size, vocabulary, dtype), Path(folder), int(steps))
    beyond = peak() - found.imported
    print(json.dumps({"seconds": found.seconds, "losses": found.losses, "peak_mib": beyond / 2**20}))
