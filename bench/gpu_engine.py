"""The engine's steps on a GPU: decoding as a share of the copy's rate, prompts as a share of the matrix product's.

A model of the size of Qwen2.5-1.5B with random weights. A step is what the engine has one take: inputs from the host,
logits left on the device. The exact logits are those of the same numbers in float32, where plain torch attends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from gpu_case import Case, Contestant, Entry, Setting, same_bits, within_rule

from fastsft.engine.device_runner import DeviceRunner
from fastsft.engine.graphs import CudaCapture
from fastsft.engine.place import graphs_serve
from fastsft.engine.runner import Inputs
from fastsft.models.config import ModelConfig
from fastsft.models.decoder import Decoder
from fastsft.models.device import DeviceDecoder, place_decoder
from fastsft.ops.device_linear import DeviceWeight

BLOCK = 16
LARGE = {
    "model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960,
    "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 32_768,
}  # fmt: skip
SMALL = LARGE | {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip


@cache
def held(setting: Setting, format: str) -> DeviceDecoder:
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = Decoder(ModelConfig.from_hf(SMALL if setting.small else LARGE)).to(torch.bfloat16)
    return place_decoder(model, format, device=setting.device)


def widened(model: DeviceDecoder, dtype: torch.dtype) -> DeviceDecoder:
    """The numbers that the weights stand for, as weights of a float type."""
    format = str(dtype).removeprefix("torch.")

    def wide(weight: DeviceWeight) -> DeviceWeight:
        data = weight.widened(torch.float32)
        if weight.format == "int8":
            data = data * weight.scales[:, None]
        return DeviceWeight(format, weight.shape, 0, data.to(dtype), data.new_empty(0))

    def field(value: Any) -> Any:
        if isinstance(value, DeviceWeight):
            return wide(value)
        return value.to(dtype) if isinstance(value, torch.Tensor) else value

    layers = [dataclasses.replace(x, **{k: field(v) for k, v in vars(x).items()}) for x in model.layers]
    return DeviceDecoder(
        model.config, model.embedding.to(dtype), layers, model.norm.to(dtype), wide(model.head), format, model.group
    )


def new_runner(model: DeviceDecoder, sequences: int, tokens: int, *, graphs: bool) -> DeviceRunner:
    graphs = graphs and model.device.type == "cuda" and graphs_serve(model.dtype)
    capture = CudaCapture(model.device) if graphs else None
    blocks = sequences * -(-tokens // BLOCK)
    runner = DeviceRunner(model, block_size=BLOCK, num_blocks=blocks, max_rows=sequences, capture=capture)
    runner.decode.capture(sequences, blocks // sequences)
    return runner


def inputs(prompt: list[int], begin: int, end: int, sequences: range) -> Inputs:
    """Tokens [begin, end) of the same prompt for some sequences, each in blocks of its own."""
    each, count = -(-len(prompt) // BLOCK), len(sequences)
    return Inputs(
        torch.tensor(prompt[begin:end] * count),
        torch.arange(count + 1, dtype=torch.int32) * (end - begin),
        torch.full((count,), end, dtype=torch.int32),
        torch.tensor([[i * each + j for j in range(each)] for i in sequences], dtype=torch.int32),
    )


def last_logits(model: DeviceDecoder, prompt: list[int]) -> torch.Tensor:
    """[V] after the whole prompt, computed at once."""
    runner = new_runner(model, 1, len(prompt), graphs=False)
    return runner.forward(inputs(prompt, 0, len(prompt), range(1)), torch.tensor([len(prompt) - 1]))[0].clone()


def prompt_of(setting: Setting, tokens: int) -> list[int]:
    vocabulary = (SMALL if setting.small else LARGE)["vocab_size"]
    return torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(3)).tolist()  # type: ignore[call-overload]


def judge_of(model: DeviceDecoder, prompt: list[int], rows: int) -> Callable[[Any], float]:
    exact, low = (last_logits(widened(model, d), prompt).expand(rows, -1) for d in (torch.float32, torch.bfloat16))
    judge = within_rule([exact.double()], [low])
    return lambda logits: judge([logits])


# --- cases ------------------------------------------------------------------------------------------------------------


def decode(sequences: int, tokens: int, format: str) -> Callable[[Setting], Case]:
    """The next token of each sequence. Its weights and all keys and values are read once."""

    def build(setting: Setting) -> Case:
        model, count = held(setting, format), 40 if setting.small else tokens
        prompt, runs = prompt_of(setting, count), {}
        step, rows = inputs(prompt, count - 1, count, range(sequences)), torch.arange(sequences)
        for name, graphs in (("fastsft", True), ("fastsft, kernel by kernel", False)):
            runner = new_runner(model, sequences, count, graphs=graphs)
            for first in range(0, sequences, 8):
                runner.forward(
                    inputs(prompt, 0, count - 1, range(first, min(first + 8, sequences))), torch.empty(0).long()
                )
            runs[name] = lambda runner=runner: runner.forward(step, rows)
        expected = runs["fastsft"]().clone()
        config = model.config
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
        equal = same_bits([expected])
        return Case(
            {
                "fastsft": Contestant(runs["fastsft"], judge_of(model, prompt, sequences)),
                "fastsft, kernel by kernel": Contestant(
                    runs["fastsft, kernel by kernel"], lambda logits: equal([logits])
                ),
            },
            moved=model.nbytes + sequences * count * per_token,
        )

    return build


def prefill(tokens: int, format: str) -> Callable[[Setting], Case]:
    """A prompt at once; logits after its last token."""

    def build(setting: Setting) -> Case:
        model, count = held(setting, format), 70 if setting.small else tokens
        prompt, config = prompt_of(setting, count), model.config
        runner, step = new_runner(model, 1, count, graphs=False), inputs(prompt, 0, count, range(1))
        rows = torch.tensor([count - 1])
        matrices = sum(w.shape[0] * w.shape[1] for x in model.layers for w in (x.qkv, x.o, x.gate_up, x.down))
        pairs = count * (count + 1) // 2
        attention = 4 * pairs * config.num_attention_heads * config.head_dim * config.num_hidden_layers
        head = 2 * config.vocab_size * config.hidden_size
        return Case(
            {"fastsft": Contestant(lambda: runner.forward(step, rows), judge_of(model, prompt, 1))},
            flops=2 * matrices * count + attention + head,
        )

    return build


ENTRIES = [
    *(
        Entry("engine", f"decode, {n} sequences of 1024, {format}", decode(n, 1024, format), quick=format == "bfloat16")
        for format in ("bfloat16", "int8", "int4")
        for n in (1, 8, 64)
    ),
    Entry("engine", "prompt of 2048, bfloat16", prefill(2048, "bfloat16")),
    Entry("engine", "prompt of 8192, bfloat16", prefill(8192, "bfloat16"), quick=False),
    Entry("engine", "prompt of 2048, int8", prefill(2048, "int8"), quick=False),
]
