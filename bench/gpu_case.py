"""What gpu_check.py runs: cases with their contestants, and the measure of correctness."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

# Share of the error allowed: at most 1 is right.
Judge = Callable[[Any], float]


@dataclass
class Contestant:
    """``judge`` is None where the result is another one than ours, as a limit's or that of another case.

    ``host``: runs on the CPU, timed by the wall clock.
    """

    run: Callable[[], Any]
    judge: Judge | None = None
    host: bool = False


@dataclass
class Case:
    """The first contestant is ours. ``absent``: those that are not here, and why.

    ``flops``, ``moved``: operations, and bytes that must cross memory, of one run of ours.
    """

    contestants: dict[str, Contestant]
    absent: dict[str, str] = field(default_factory=dict)
    flops: float | None = None
    moved: float | None = None


@dataclass(frozen=True)
class Setting:
    """``small``: sizes that a CPU runs in seconds, to test the cases themselves."""

    device: torch.device
    small: bool

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def generator(self, seed: int = 0) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)


@dataclass(frozen=True)
class Entry:
    """``quick``: part of a quick run too."""

    group: str
    name: str
    build: Callable[[Setting], Case]
    quick: bool = True


def within_rule(exact: Sequence[torch.Tensor], low: Sequence[torch.Tensor]) -> Judge:
    """The rule of docs/numerics.md in norms: at most twice the error of torch in the same dtype, and a little."""
    allowed = [2 * (b.double() - a).norm() + 1e-5 * a.norm() for a, b in zip(exact, low, strict=True)]

    def judge(results: Sequence[torch.Tensor]) -> float:
        errors = [(r.double() - a).norm() for r, a in zip(results, exact, strict=True)]
        shares = [float(error / limit) for error, limit in zip(errors, allowed, strict=True)]
        return float("nan") if any(math.isnan(share) for share in shares) else max(shares)

    return judge


def same_bits(expected: Sequence[torch.Tensor]) -> Judge:
    """0 where all results equal, infinity otherwise."""

    def judge(results: Sequence[torch.Tensor]) -> float:
        pairs = zip(results, expected, strict=True)
        equal = all(a.shape == b.shape and bool((a.cpu() == b.cpu()).all()) for a, b in pairs)
        return 0.0 if equal else float("inf")

    return judge
