"""The cases of ``bench_train.py`` and ``bench_plugin.py``: model sizes, the documents of a step, what is recorded."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

SIZES: dict[str, dict[str, int]] = {
    "30 M": {"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 10,
             "num_attention_heads": 6, "num_key_value_heads": 2},
    "120 M": {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 14,
              "num_attention_heads": 12, "num_key_value_heads": 4},
}  # fmt: skip
VOCABULARIES = {"32k": 32_768, "152k": 151_936}
DOCUMENTS = 8
LEARNING_RATE, BETAS, EPSILON, CLIP = 3e-4, (0.9, 0.95), 1e-8, 1.0  # no weight decay: who is exempt differs


@dataclass(frozen=True)
class Case:
    """``size`` names the model by its parameters at a vocabulary of 32k; ``dtype`` is a name in torch."""

    size: str
    vocabulary: str
    dtype: str

    @property
    def config(self) -> dict[str, Any]:
        """Of a Qwen2 model, as in its config.json."""
        return {
            "model_type": "qwen2", "vocab_size": VOCABULARIES[self.vocabulary], "tie_word_embeddings": True,
            "max_position_embeddings": 4096, "initializer_range": 0.02, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0,
            **SIZES[self.size],
        }  # fmt: skip

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


@dataclass(frozen=True)
class Document:
    """Token ids, of which the first ``prompt`` are not trained on."""

    ids: list[int]
    prompt: int

    @property
    def labels(self) -> list[int]:
        return [-100] * self.prompt + self.ids[self.prompt :]


def documents(vocab_size: int) -> list[Document]:
    """What every step trains on: log-normal lengths (2,744 tokens, a third of what padding makes of them), a prompt of
    a tenth to six tenths of each, random tokens."""
    generator = random.Random(0)
    shapes = [(generator.lognormvariate(5.4, 0.8), generator.uniform(0.1, 0.6)) for _ in range(DOCUMENTS)]
    found = []
    for drawn, share in shapes:
        length = min(1024, round(drawn))
        ids = [generator.randrange(vocab_size) for _ in range(length)]
        found.append(Document(ids, prompt=int(length * share)))
    return found


class Replay:
    """A clock that is set forward by times measured elsewhere."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def record_steps(benchmark: Any, clock: Replay, found: dict[str, Any], group: str) -> None:
    """The steps of a contestant's run; the first is not counted."""
    benchmark.group = group
    seconds = found["seconds"][1:]
    left = iter(seconds)
    benchmark.pedantic(lambda: clock.advance(next(left)), rounds=len(seconds))
    tokens = sum(len(d.ids) for d in documents(1))
    benchmark.extra_info |= {
        "tokens_per_second": tokens / benchmark.stats["median"], "peak_MiB": found["peak_mib"],
    }  # fmt: skip
