"""A tiny model, random weighted samples and torch's own optimizer, for the tests of training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from fastsft.config import ObjectiveOptions, OptimOptions
from fastsft.data.batch import Sample, VarlenBatch, collate
from fastsft.models.decoder import Decoder
from fastsft.models.weights import init_model
from fastsft.train.distributed import World
from fastsft.train.objective import Objective
from fastsft.train.optim import MasterAdamW
from fastsft.train.parallel import Copies
from fastsft.train.update import Update

MODEL = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
}
NEEDS_MUON = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")


def random_samples(count: int, seed: int, *, longest: int = 24) -> list[Sample]:
    """Random ids with weights that are 0, 1 or a fraction; at least one target counts."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(count):
        n = int(rng.integers(2, longest))
        weights = rng.choice(np.array([0, 1, 0.5], np.float32), n)
        weights[1] = 1
        samples.append(Sample(rng.integers(0, 97, n).astype(np.int32), weights, f"row:{i + 1}"))
    return samples


def model_of(seed: int = 0, dtype: torch.dtype = torch.float32, **keys: Any) -> Decoder:
    return init_model(MODEL | keys, seed=seed, dtype=dtype)


def torch_adamw(model: torch.nn.Module, options: OptimOptions) -> torch.optim.AdamW:
    decayed = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    plain = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "embed" not in n)]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=options.lr, betas=(options.beta1, options.beta2), eps=options.eps, foreach=False, fused=False,
    )  # fmt: skip


def collated(count: int, seed: int) -> VarlenBatch:
    return collate(random_samples(count, seed))


def gradients_of_a_step(
    dtype: torch.dtype, count: int, mode: str = "ddp", world: World | None = None
) -> dict[str, torch.Tensor]:
    """Of ``count`` micro-batches: the gradients that the optimizer would step with, in one piece."""
    model = model_of(dtype=dtype)
    parallel = Copies(model, world)
    if mode == "fsdp":
        from fastsft.train.shards import Shards

        assert world is not None
        parallel = Shards(model, world)
    optimizer = MasterAdamW(parallel.parameters, OptimOptions())
    seen: dict[str, torch.Tensor] = {}

    def step(rate: float, norm: torch.Tensor) -> None:
        whole = dict(parallel.named())
        for one in optimizer.trained:
            assert one.gradient is not None
            like: Any = whole[one.name]
            gradient = one.gradient.float()
            if mode == "fsdp":
                gradient = DTensor.from_local(
                    gradient, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
                ).full_tensor()
            seen[one.name] = gradient.clone()
        expected = torch.stack([g.double().norm() for g in seen.values()]).norm()
        assert abs(float(norm / expected) - 1) <= 1e-5

    optimizer.step = step  # type: ignore[method-assign]
    update = Update(model, optimizer, Objective(ObjectiveOptions()), seed=0, parallel=parallel)
    update(0, [collate(random_samples(4, i)) for i in range(count)], 1.0)
    return seen
