"""One training step, forward, backward and AdamW, of decoders of 31 M and 115 M parameters on one packed batch, against
the same decoder on torch's own operations; and where the step's time goes.

The batch: 2,048 tokens with the lengths of GSM8K. The gate: losses agree before anything is timed.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from shapes import GSM8K_DECILES, from_deciles
from torch.nn import functional

from fastsft import ops
from fastsft.config import OptimOptions
from fastsft.models import attend, layers
from fastsft.models.weights import init_model
from fastsft.ops import reference
from fastsft.train.optim import MasterAdamW

TOKENS = 2048
MODELS: dict[str, dict[str, int]] = {
    "31 M": {"vocab_size": 16_384, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
             "num_attention_heads": 8, "num_key_value_heads": 2},
    "115 M": {"vocab_size": 32_768, "hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 12,
              "num_attention_heads": 12, "num_key_value_heads": 4},
}  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


def sdpa_each(q, k, v, cu_seqlens, **_):
    """torch has no varlen attention on a CPU: one call per document."""
    parts = []
    for a, b in itertools.pairwise(cu_seqlens.tolist()):
        heads = [t[a:b].transpose(0, 1)[None] for t in (q, k, v)]
        out = functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def upcast_loss(hidden, weight, targets):
    return functional.cross_entropy(functional.linear(hidden, weight).float(), targets)


OURS: dict[str, Callable[..., torch.Tensor]] = {
    "linear": ops.linear,
    "attention": ops.varlen_attention,
    "loss": ops.linear_cross_entropy,
    "norm": ops.rms_norm,
    "rope": ops.apply_rope,
    "swiglu": ops.swiglu,
}
TORCH: dict[str, Callable[..., torch.Tensor]] = {
    "linear": functional.linear,
    "attention": sdpa_each,
    "loss": upcast_loss,
    "norm": reference.rms_norm,
    "rope": reference.apply_rope,
    "swiglu": reference.swiglu,
}
PLACES = {
    "linear": (layers, "linear"),
    "norm": (layers, "rms_norm"),
    "rope": (layers, "apply_rope"),
    "swiglu": (layers, "swiglu"),
    "attention": (attend.ops, "varlen_attention"),
}


class Clock:
    """Seconds by part. What is not inside a part counts as the rest."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self.part, self.since = "rest", time.perf_counter()

    def switch(self, part: str) -> None:
        now = time.perf_counter()
        self.spent[self.part] += now - self.since
        self.part, self.since = part, now

    def watched(self, part: str, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """The function with marks around its forward and, through autograd, its backward pass."""

        def run(*args: Any, **kw: Any) -> torch.Tensor:
            marked = [
                _Mark.apply(a, self, "rest") if isinstance(a, torch.Tensor) and a.grad_fn is not None else a
                for a in args
            ]
            self.switch(part)
            out = function(*marked, **kw)
            self.switch("rest")
            return _Mark.apply(out, self, part)  # type: ignore[no-untyped-call]

        return run


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, clock: Clock, part: str) -> torch.Tensor:
        ctx.clock, ctx.part = clock, part
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        ctx.clock.switch(ctx.part)
        return grad, None, None


class Training:
    def __init__(self, size: str, dtype: torch.dtype) -> None:
        config = MODELS[size] | {"model_type": "qwen2", "tie_word_embeddings": True, "max_position_embeddings": 4096}
        self.model = init_model(config, seed=0, dtype=dtype)
        self.optimizer = MasterAdamW(self.model, OptimOptions())
        mix = from_deciles("gsm8k", GSM8K_DECILES, TOKENS)
        self.cu_seqlens = mix.cu_seqlens
        self.positions = torch.cat([torch.arange(n) for n in mix.lengths])
        self.ids = torch.randint(config["vocab_size"], (TOKENS,), generator=torch.Generator().manual_seed(0))

    def step(self, parts: dict[str, Callable[..., torch.Tensor]], clock: Clock | None = None) -> float:
        if clock is not None:
            clock.since = time.perf_counter()
            parts = {name: clock.watched(name, function) for name, function in parts.items()}
        with replaced(parts):
            hidden = self.model(self.ids, self.positions, attend.VarlenAttend(self.cu_seqlens))
            loss = parts["loss"](hidden, self.model.lm_head_weight, self.ids.roll(-1))
            loss.backward()
        if clock is not None:
            clock.switch("optimizer")
        self.optimizer.collect()
        self.optimizer.step(1e-5, self.optimizer.grad_norm())
        if clock is not None:
            clock.switch("rest")
        return float(loss.detach())


@contextmanager
def replaced(parts: dict[str, Callable[..., torch.Tensor]]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, (module, attribute) in PLACES.items():
            stack.enter_context(mock.patch.object(module, attribute, parts[name]))
        yield


CONTESTANTS = {"fastsft": OURS, "torch": TORCH}


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", MODELS)
def test_step(benchmark, size, dtype, contestant):
    losses = [Training(size, DTYPES[dtype]).step(parts) for parts in CONTESTANTS.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2 if dtype == "bf16" else 1e-5)
    training, parts = Training(size, DTYPES[dtype]), CONTESTANTS[contestant]
    benchmark.group = f"training step, {size} parameters, {dtype}, {TOKENS} tokens"
    benchmark.pedantic(training.step, (parts,), rounds=5, warmup_rounds=2)
    benchmark.extra_info["tokens_per_s"] = TOKENS / benchmark.stats["median"]
    shares = []
    for _ in range(3):
        clock = Clock()
        training.step(parts, clock)
        shares.append(clock.spent)
    for name in shares[0]:
        benchmark.extra_info[f"{name}_ms"] = 1e3 * sorted(s[name] for s in shares)[1]
