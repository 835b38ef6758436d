"""Small decoders of every kind, and their steps over a cache whose blocks are in no order."""

from __future__ import annotations

import copy
import itertools
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastsft.models import attend, layers
from fastsft.models.attend import VarlenAttend
from fastsft.models.decoder import Decoder
from fastsft.models.packed import PackedDecoder
from fastsft.models.weights import init_model
from fastsft.ops import reference
from fastsft.ops.decoder import DecoderAdapter

BLOCK = 16
SHAPE = {
    "model_type": "llama",
    "vocab_size": 301,
    "hidden_size": 96,
    "intermediate_size": 168,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "initializer_range": 0.15,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied, one key head": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen2": {"model_type": "qwen2", "rope_theta": 1e6},
    "qwen3": {"model_type": "qwen3", "head_dim": 80, "attention_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": 9},
    "windows in some layers": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1,
    },
    "rope, linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "rope, llama3": {
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "rope, yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
}  # fmt: skip


def model_of(kind: str, dtype: torch.dtype = torch.float32) -> Decoder:
    """With biases and norms that are not trivial."""
    model = init_model(SHAPE | KINDS[kind], seed=3, dtype=dtype)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.empty(parameter.shape).normal_(0, 0.3, generator=generator))
    return model


def tokens_of(*lengths: int, vocab: int = SHAPE["vocab_size"]) -> list[list[int]]:  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def logits_in_training(model: Decoder, tokens: list[int]) -> Tensor:
    """[T, V] by models/decoder.py, in the model's own type."""
    ids, T = torch.tensor(tokens), len(tokens)
    hidden = model(ids, torch.arange(T), VarlenAttend(torch.tensor([0, T], dtype=torch.int32)))
    return hidden @ model.lm_head_weight.T


def exact_logits(model: Decoder, tokens: list[int]) -> Tensor:
    """The same in float64, by the reference of every op."""
    with ExitStack() as stack:
        for name in ("rms_norm", "apply_rope", "swiglu", "linear"):
            stack.enter_context(mock.patch.object(layers, name, getattr(reference, name)))
        stack.enter_context(mock.patch.object(attend.ops, "varlen_attention", reference_attention))
        return logits_in_training(copy.deepcopy(model).double(), tokens)


def reference_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, **options: Any) -> Tensor:
    out: Tensor = reference.varlen_attention(q, k, v, cu_seqlens, causal=True, window=options["window"])[0]
    return out


class Session:
    """Sequences over a cache of their own."""

    def __init__(self, packed: PackedDecoder, kv_format: str | None = None, num_blocks: int = 64) -> None:
        self.packed = packed
        self.kv_format = kv_format or str(packed.dtype).removeprefix("torch.")
        self.cache = packed.new_cache(num_blocks, kv_format=self.kv_format, block_size=BLOCK)
        self.cache.fill_(0xCD)
        self._free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(2)).tolist()
        self.blocks: dict[Any, list[int]] = {}
        self.adapters: dict[Any, DecoderAdapter] = {}
        self.computed: dict[Any, int] = {}

    def step(self, work: dict[Any, list[int]]) -> dict[Any, Tensor]:
        """The next tokens of each sequence; logits [tokens, V] of each."""
        for name, tokens in work.items():
            blocks, end = self.blocks.setdefault(name, []), self.computed.get(name, 0) + len(tokens)
            while len(blocks) * BLOCK < end:
                blocks.append(self._free.pop())
            self.computed[name] = end
        bounds = [0, *itertools.accumulate(len(t) for t in work.values())]
        width = max(len(self.blocks[name]) for name in work)
        out = self.packed.step(
            torch.tensor([t for tokens in work.values() for t in tokens]),
            self.cache,
            torch.tensor([self.blocks[n] + [0] * (width - len(self.blocks[n])) for n in work], dtype=torch.int32),
            torch.tensor(bounds, dtype=torch.int32),
            torch.tensor([self.computed[n] for n in work], dtype=torch.int32),
            torch.arange(bounds[-1]),
            kv_format=self.kv_format,
            block_size=BLOCK,
            adapters=[self.adapters.get(name) for name in work] if self.adapters else [],
        )
        return {name: out[a:b] for name, (a, b) in zip(work, itertools.pairwise(bounds), strict=True)}

    def assert_rows(self, texts: list[list[int]], alone: list[Tensor]) -> None:
        """Each row as in ``alone``, in new sequences side by side: prompts beside single tokens and drafts."""
        at = [0] * len(texts)
        for round_ in itertools.count():
            work = {}
            for i, tokens in enumerate(texts):
                size = (1, 4, 16, 1)[(i + round_) % 4]
                if at[i] < len(tokens):
                    work[i] = tokens[at[i] : at[i] + size]
            if not work:
                return
            for i, rows in self.step(work).items():
                assert torch.equal(rows, alone[i][at[i] : at[i] + len(rows)]), (i, at[i])
                at[i] += len(rows)

    def run(self, tokens: list[int], *sizes: int, adapter: DecoderAdapter | None = None) -> Tensor:
        """All logits [T, V] of a new sequence computed in pieces of these sizes, the last one repeated."""
        name, parts, begin = object(), [], 0
        if adapter:
            self.adapters[name] = adapter
        for size in itertools.chain(sizes or (len(tokens),), itertools.repeat(sizes[-1] if sizes else 1)):
            if begin >= len(tokens):
                return torch.cat(parts)
            parts.append(self.step({name: tokens[begin : begin + size]})[name])
            begin += size
        raise AssertionError
