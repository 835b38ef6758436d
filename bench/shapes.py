"""The length mixes and model shapes that the benches share."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

import torch

from fastsft.bench.limits import Limits


@dataclass(frozen=True)
class Mix:
    """One packed batch: the number of tokens of each of its sequences."""

    name: str
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def cu_seqlens(self) -> torch.Tensor:
        return torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32)

    @property
    def causal_pairs(self) -> int:
        """Visible (query, key) pairs: the unit in which attention's work is counted."""
        return sum(n * (n + 1) // 2 for n in self.lengths)


@dataclass(frozen=True)
class Heads:
    """The attention shape of a model."""

    name: str
    query: int
    key: int
    dim: int


QWEN_05B = Heads("Qwen2.5-0.5B", query=14, key=2, dim=64)
LLAMA_8B = Heads("Llama-3-8B", query=32, key=8, dim=128)


def uniform(count: int, length: int) -> Mix:
    return Mix(f"{count}x{length}", (length,) * count)


def from_deciles(name: str, deciles: tuple[int, ...], tokens: int, seed: int = 0) -> Mix:
    """Lengths drawn from the piecewise linear distribution through the deciles, up to ``tokens`` in all."""
    generator = random.Random(seed)
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        low, high = generator.choice(list(itertools.pairwise(deciles)))
        lengths.append(min(left, round(generator.uniform(low, high))))
    return Mix(name, tuple(lengths))


# Deciles of the sample lengths of two public instruction sets, with four characters counted as a token.
GSM8K_DECILES = (31, 73, 86, 98, 109, 121, 134, 150, 170, 202, 422)
NL2BASH_DECILES = (5, 17, 20, 24, 26, 29, 32, 36, 40, 48, 230)

UNIFORM_2K = (uniform(32, 64), uniform(8, 256), uniform(1, 2048))
MIXES_2K = (
    *UNIFORM_2K,
    from_deciles("gsm8k", GSM8K_DECILES, 2048),
    from_deciles("nl2bash", NL2BASH_DECILES, 2048),
    Mix("one long, many short", (1024, *(16,) * 64)),
)


def layer_step(benchmark: Any, limits: Limits, group: str, contestants: dict[str, Any], contestant: str,
               inputs: list[torch.Tensor], passes: int, constants: int = 0) -> None:  # fmt: skip
    """Time forward and backward of an op of a layer, whose result must agree with the first contestant's.

    ``passes``: how often the first input's bytes have to cross memory at least; the last ``constants`` inputs get no
    gradient.
    """
    ours, function = next(iter(contestants.values())), contestants[contestant]
    tolerance = 1e-5 if inputs[0].dtype == torch.float32 else 4e-2
    torch.testing.assert_close(function(*inputs), ours(*inputs), rtol=tolerance, atol=tolerance)
    leaves = [t.clone().requires_grad_(i < len(inputs) - constants) for i, t in enumerate(inputs)]
    upstream = torch.randn_like(ours(*inputs))

    def step() -> None:
        torch.autograd.grad(function(*leaves), leaves[: len(leaves) - constants], upstream)

    benchmark.group = group
    benchmark.pedantic(step, rounds=15, warmup_rounds=2)
    moved = passes * inputs[0].numel() * inputs[0].element_size()
    benchmark.extra_info["gbytes_per_s"] = moved / benchmark.stats["median"] / 1e9
    limits.share_bytes(benchmark, copied=moved)
