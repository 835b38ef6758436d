"""The losses of a run, and those of the same batches in a plain loop over transformers' model with torch's AdamW."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch

from fastsft.data.batch import Sample, VarlenBatch
from fastsft.data.loader import PackedLoader
from fastsft.data.prepare import Prepared
from fastsft.data.store import SampleStore
from fastsft.models.tokenizer import Tokenizer
from fastsft.models.weights import init_model, save_model
from fastsft.train.metrics import read_metrics
from fastsft.train.trainer import Trainer

MODEL = {
    "model_type": "qwen2", "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
CAPACITY, LEARNING_RATE, BETAS, EPSILON, CLIP = 1024, 1e-3, (0.9, 0.95), 1e-8, 1.0


def store_of(steps: int) -> SampleStore:
    """A batch's worth of documents for each step: log-normal lengths, a prompt before what is trained on, and text that
    can be learnt: of 64 tokens each is followed by one of four."""
    rng = np.random.default_rng(0)
    follower = rng.integers(0, 64, (64, 4))
    samples, tokens = [], 0
    while tokens < steps * CAPACITY:
        length = int(np.clip(rng.lognormal(4.5, 0.7), 8, 512))
        ids = [int(rng.integers(0, 64))]
        for choice in rng.integers(0, 4, length - 1):
            ids.append(int(follower[ids[-1], choice]))
        weights = (np.arange(length) >= rng.integers(1, length // 2)).astype(np.float32)
        samples.append(Sample(np.array(ids, np.int32), weights))
        tokens += length
    return SampleStore.from_samples(samples)


def ours(store: SampleStore, model: Path, output: Path, steps: int) -> list[float]:
    """The losses of a run of the trainer."""
    beta1, beta2 = BETAS
    config = {
        "output": str(output),
        "model": {"path": str(model), "dtype": "float32"},
        "optim": {"lr": LEARNING_RATE, "beta1": beta1, "beta2": beta2, "eps": EPSILON, "clip_norm": CLIP},
        "schedule": {"kind": "constant", "warmup": 0},
        "data": {"max_length": 512},
        "train": {"tokens_per_batch": CAPACITY, "max_steps": steps, "epochs": 9, "save_every": 0},
    }
    prepared = Prepared(store, SampleStore.from_samples([]), Tokenizer.from_folder(model), {"key": "curve"})
    Trainer(config, prepared=prepared, progress=False).run()
    return [row["loss"] for row in read_metrics(output / "metrics.jsonl") if row["kind"] == "step"]


def theirs(store: SampleStore, model: Path, steps: int) -> list[float]:
    """The losses of the same batches, padded, under transformers' own loss."""
    from transformers import Qwen2ForCausalLM

    decoder = Qwen2ForCausalLM.from_pretrained(model, dtype=torch.float32)
    adamw = torch.optim.AdamW(decoder.parameters(), LEARNING_RATE, BETAS, EPSILON, weight_decay=0.0)
    loader = PackedLoader(store, capacity=CAPACITY, seed=0)
    order = ((epoch, i) for epoch in itertools.count() for i in range(loader.num_batches(epoch)))
    losses = []
    for epoch, i in itertools.islice(order, steps):
        loss = decoder(**padded(loader.batch(epoch, i))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), CLIP)
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    return losses


def padded(batch: VarlenBatch) -> dict[str, torch.Tensor]:
    """Documents as rows; labels as transformers has them, a token's own and not the next."""
    bounds = list(itertools.pairwise(batch.cu_seqlens.tolist()))
    longest = max(end - begin for begin, end in bounds)
    ids = torch.zeros(len(bounds), longest, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (begin, end) in enumerate(bounds):
        ids[row, : end - begin] = batch.ids[begin:end]
        mask[row, : end - begin] = 1
        labels[row, 1 : end - begin] = batch.targets[begin : end - 1]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def write_model(folder: Path) -> Path:
    save_model(init_model(MODEL, seed=0), folder)
    Tokenizer.train(["def f(x): return x"], 300).save(folder)
    return folder
