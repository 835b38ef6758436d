"""The strongest simple rival of the trainer: a Qwen2 decoder and its training step in plain torch, written for packed
documents. One ``scaled_dot_product_attention`` per document, the head on the rows with a label alone, torch's fused
AdamW. Tensors are [tokens, ...]."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Weights = dict[str, torch.nn.Parameter]


class PlainDecoder:
    """``weights`` and ``config``: those of a Hugging Face folder, with the embedding as its head."""

    def __init__(self, weights: dict[str, Tensor], config: dict[str, Any], dtype: torch.dtype) -> None:
        self.weights: Weights = {
            name.removeprefix("model."): torch.nn.Parameter(w.to(dtype)) for name, w in weights.items()
        }
        self.config = config
        self.head_dim = config["hidden_size"] // config["num_attention_heads"]

    def loss(self, ids: Tensor, lengths: Sequence[int], labels: Tensor) -> Tensor:
        """Mean over the labels that are not -100, which are those of the next token."""
        w, c = self.weights, self.config
        x = w["embed_tokens.weight"][ids]
        turn = self._turn(lengths, x.dtype)
        for i in range(c["num_hidden_layers"]):
            x = x + self._attention(self._norm(x, f"layers.{i}.input_layernorm"), i, lengths, turn)
            x = x + self._mlp(self._norm(x, f"layers.{i}.post_attention_layernorm"), i)
        rows = (labels != -100).nonzero().squeeze(1)
        hidden = self._norm(x[rows], "norm")
        logits = functional.linear(hidden, w["embed_tokens.weight"])
        return functional.cross_entropy(logits.float(), labels[rows])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.config["rms_norm_eps"])

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return functional.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _turn(self, lengths: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rotary embedding."""
        positions = torch.cat([torch.arange(n, dtype=torch.float32) for n in lengths])
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        angles = positions[:, None] * self.config["rope_theta"] ** -steps
        both = torch.cat([angles, angles], 1)[:, None]
        return both.cos().to(dtype), both.sin().to(dtype)

    def _attention(self, x: Tensor, layer: int, lengths: Sequence[int], turn: tuple[Tensor, Tensor]) -> Tensor:
        at = f"layers.{layer}.self_attn"
        q, k, v = [self._linear(x, f"{at}.{n}_proj").unflatten(1, (-1, self.head_dim)) for n in "qkv"]
        q, k = _rotated(q, turn), _rotated(k, turn)
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        parts = []
        for begin, end in itertools.pairwise([0, *itertools.accumulate(lengths)]):
            heads = [t[begin:end].transpose(0, 1)[None] for t in (q, k, v)]
            parts.append(functional.scaled_dot_product_attention(*heads, is_causal=True)[0].transpose(0, 1))
        return self._linear(torch.cat(parts).flatten(1), f"{at}.o_proj")

    def _mlp(self, x: Tensor, layer: int) -> Tensor:
        at = f"layers.{layer}.mlp"
        gate, up = self._linear(x, f"{at}.gate_proj"), self._linear(x, f"{at}.up_proj")
        return self._linear(functional.silu(gate) * up, f"{at}.down_proj")


def _rotated(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * turn[0] + torch.cat([-b, a], -1) * turn[1]


class PlainOptimizer:
    """Fused AdamW with clipping, on float32 masters of 16-bit parameters if ``masters``, else on the parameters."""

    def __init__(self, decoder: PlainDecoder, *, masters: bool, clip: float, **options: Any) -> None:
        self.parameters = list(decoder.weights.values())
        self.masters = [torch.nn.Parameter(p.detach().float()) for p in self.parameters] if masters else self.parameters
        self.adamw = torch.optim.AdamW(self.masters, fused=True, weight_decay=0.0, **options)
        self.clip = clip

    def step(self) -> None:
        if self.masters is not self.parameters:
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, self.clip)
        self.adamw.step()
        self.adamw.zero_grad()
        if self.masters is not self.parameters:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.masters)
