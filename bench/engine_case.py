"""The cases of ``bench_engine.py``: models, weight formats and prompts."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_case import SIZES
from train_case import Case as Trained

FORMATS = ("float32", "bfloat16", "int8", "int4")
BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4.5}  # int4: a 16-bit scale per 32 weights
HEAD_DIM = 64
CONTEXT = 4096
INITIALIZER_RANGE = 0.04  # of 0.02, a tied head repeats the last token


@dataclass(frozen=True)
class Case:
    """A model of ``size`` with its weights in ``format``, on that many threads."""

    size: str
    format: str
    threads: int

    @property
    def activations(self) -> str:
        """Their type, as torch names it; the cache's too."""
        return "float32" if self.format == "float32" else "bfloat16"

    def bytes_per_step(self, batch: int, context: int) -> float:
        """What a decoding step has to read: every matrix once, each sequence's keys and values."""
        c = model_config(self.size)
        hidden, width, kv = c["hidden_size"], c["intermediate_size"], c["num_key_value_heads"] * HEAD_DIM
        layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * width
        weights = c["num_hidden_layers"] * layer + c["vocab_size"] * hidden
        cached = c["num_hidden_layers"] * 2 * kv * context * batch
        return weights * BITS[self.format] / 8 + cached * BITS[self.activations] / 8


def model_config(size: str) -> dict[str, Any]:
    """Of a Qwen2 model, as in its config.json."""
    assert size in SIZES
    return {**Trained(size, "32k", "float32").config, "initializer_range": INITIALIZER_RANGE}


def prompts(size: str, count: int, length: int, seed: int) -> list[list[int]]:
    """Random tokens, others in each prompt and for each seed: no cache of prompts has seen them."""
    generator = random.Random(f"{count} {length} {seed}")
    vocabulary = model_config(size)["vocab_size"]
    return [[generator.randrange(vocabulary) for _ in range(length)] for _ in range(count)]


def requests(size: str, count: int) -> tuple[list[list[int]], list[int]]:
    """Prompts that begin with the same 256 tokens, and the number of tokens that each is to be continued by; both
    log-normal, as chats are: most are short, and a static batch waits for its longest."""
    generator = random.Random(0)
    vocabulary = model_config(size)["vocab_size"]

    def tokens(length: int) -> list[int]:
        return [generator.randrange(vocabulary) for _ in range(length)]

    system = tokens(256)
    asked = [system + tokens(min(400, max(8, round(generator.lognormvariate(3.7, 0.7))))) for _ in range(count)]
    return asked, [min(256, max(4, round(generator.lognormvariate(3.2, 1.0)))) for _ in range(count)]


def write_model(size: str, folder: Path) -> None:
    """A randomly initialised model with a small tokenizer, which no contestant needs but some insist on."""
    from fastsft.models.tokenizer import Tokenizer
    from fastsft.models.weights import init_model, save_model

    save_model(init_model(model_config(size), seed=0), folder)
    Tokenizer.train(["def f(x): return x"], 300).save(folder)
