"""Tiny models of random weights, of the families that differ in what they ask of attention and loss."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import transformers

VOCABULARY = 97
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**COMMON),
    "qwen2": transformers.Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": transformers.Qwen3Config(**COMMON, head_dim=32),
    "mistral": transformers.MistralConfig(**COMMON, sliding_window=6),
    "gemma2": transformers.Gemma2Config(
        **COMMON, head_dim=32, sliding_window=6, query_pre_attn_scalar=20, attn_logit_softcapping=3.0,
        final_logit_softcapping=2.0,
    ),
}  # fmt: skip


def build(config: Any, attention: str) -> Any:
    """The same weights whatever the attention; far enough from zero that attention matters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config))
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.set_attn_implementation(attention)
    return model.eval()


def ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(rows * length))


def gradients(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield name, parameter.grad


def assert_same_gradients(model: Any, other: Any, rtol: float = 1e-4) -> None:
    """Relative to each parameter's largest gradient."""
    ours, theirs = dict(gradients(model)), dict(gradients(other))
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        limit = rtol * float(theirs[name].abs().max()) + 1e-7
        torch.testing.assert_close(gradient, theirs[name], rtol=0, atol=limit, msg=lambda m, n=name: f"{n}: {m}")
