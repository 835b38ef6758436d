"""A step of the packed decoder, against the machine's read bandwidth and against a step of one row.

Decoders of 39 M and 100 M parameters, a context of 256 tokens, one thread. ``share_of_stream``: bytes of weights, keys
and values per second by the rate at which torch sums a large array; ``times_one_row``: the time of
a step of 4, 8 or 16 rows of one sequence by that of one; prompts of 512 tokens in tokens per second; ``update_ms``: new
weights into the same memory.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import pytest
import torch

from fastsft import _C
from fastsft.models.packed import PackedDecoder, pack_decoder
from fastsft.models.weights import init_model

BLOCK, CONTEXT, PROMPT = 64, 256, 512
MODELS: dict[str, dict[str, int]] = {
    "39 M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
             "num_key_value_heads": 2},
    "100 M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
              "num_key_value_heads": 4},
}  # fmt: skip


@functools.lru_cache(maxsize=1)
def packed(size: str, format: str) -> PackedDecoder:
    config = MODELS[size] | {"model_type": "llama", "vocab_size": 32_000, "tie_word_embeddings": True}
    return pack_decoder(init_model(config, seed=0), format)


def step_of(model: PackedDecoder, rows: int, context: int) -> Callable[[], torch.Tensor]:
    """The last ``rows`` tokens of one sequence; logits of all, or of the last one of a prompt."""
    kv_format = str(model.dtype).removeprefix("torch.")
    blocks = -(-context // BLOCK)
    cache = model.new_cache(blocks, kv_format=kv_format, block_size=BLOCK).zero_()
    arguments = (
        torch.arange(rows), cache, torch.arange(blocks, dtype=torch.int32)[None],
        torch.tensor([0, rows], dtype=torch.int32), torch.tensor([context], dtype=torch.int32),
        torch.arange(rows) if rows < PROMPT else torch.tensor([rows - 1]),
    )  # fmt: skip
    return lambda: model.step(*arguments, kv_format=kv_format, block_size=BLOCK)


def seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads(), _C.num_threads()
    torch.set_num_threads(1)
    _C.set_num_threads(1)
    yield
    torch.set_num_threads(before[0])
    _C.set_num_threads(before[1])


@pytest.mark.parametrize("format", ["float32", "bfloat16", "w8a8", "int8", "int4"])
@pytest.mark.parametrize("size", MODELS)
def test_step(benchmark, limits, size, format):
    model = packed(size, format)
    steps = {rows: step_of(model, rows, CONTEXT) for rows in (1, 4, 8, 16)}
    prompt = step_of(model, PROMPT, PROMPT)
    times: dict[object, list[float]] = {name: [] for name in (*steps, "prompt")}

    def one_round():
        for rows, step in steps.items():
            times[rows].append(seconds(step))
        times["prompt"].append(seconds(prompt))

    benchmark.group = f"decoder step, {size}, {format}"
    benchmark.pedantic(one_round, rounds=15, warmup_rounds=2)
    median = {name: statistics.median(t[2:]) for name, t in times.items()}
    config = model.config
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * CONTEXT * model.dtype.itemsize
    info = benchmark.extra_info
    info["tokens_per_s"] = 1 / median[1]
    info["share_of_stream"] = (model.nbytes + kv) / median[1] / limits.stream()
    info["times_one_row"] = {rows: round(median[rows] / median[1], 2) for rows in steps}
    info["prompt_tokens_per_s"] = PROMPT / median["prompt"]
    source = init_model(config, seed=1)
    info["update_ms"] = 1e3 * statistics.median(seconds(lambda: model.update(source)) for _ in range(5))
