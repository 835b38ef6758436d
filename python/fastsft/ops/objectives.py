"""Training objectives: from a token's log-probability, entropy and reference to its loss and its weight.

With l the log-probability of the target under the model in training, p = exp(l), H the entropy, r the log-probability
under another policy, u = l - r, and sg a constant, an objective is a function psi per token; the gradient of the loss
with respect to the logits is w (softmax - one-hot) with w = -psi'(l), where what stands under sg counts as constant.
Everything here works on vectors of one number per token, on any device. The formulas and their sources:
docs/objectives.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass
class Tokens:
    """What an objective may look at, one number per token kept: float32 [n]."""

    logprob: Tensor
    entropy: Tensor
    token_weights: Tensor
    ref_logprobs: Tensor | None
    vocab: int
    sequences: Sequences | None = None
    begin: int = 0  # of these tokens among all that are kept

    @property
    def log_ratio(self) -> Tensor:
        if self.ref_logprobs is None:
            raise RuntimeError("objective: no reference log-probabilities")
        return self.logprob - self.ref_logprobs


Term = Callable[..., tuple[Tensor, Tensor]]  # (Tokens, arguments by name) -> psi, w


@dataclass(frozen=True)
class Objective:
    """One row of the table.

    ``arguments``: name -> default, or the choices of which the first is the default. ``scope``: whether the weight
    depends on the token's own row, on the rest of its sequence, or on all of it. ``needs``: the input it takes.
    """

    term: Term
    arguments: Mapping[str, float | tuple[str, ...]] = field(default_factory=dict)
    scope: str = "row"  # or "suffix" or "sequence"
    needs: str = ""  # or "ref_logprobs" or "reference"


# --- sequences --------------------------------------------------------------------------------------------------------


class Sequences:
    """Where the tokens kept begin and end their sequences, and the running sum of a quantity from each sequence's end.

    The rows are visited in tiles from the last to the first, so when a tile is reached, all later rows are known.
    """

    def __init__(self, kept: Tensor, cu_seqlens: Tensor, total: int) -> None:
        """``kept``: int64 [rows], which of the ``total`` tokens each row is, ascending; ``total`` for empty rows."""
        ends = functional.pad(cu_seqlens[1:].to(kept.dtype), (0, 1), value=total)  # the rest is one more sequence
        member = torch.bucketize(kept, ends, right=True)
        bounds = functional.pad(torch.searchsorted(kept, ends), (1, 0))  # in rows; bincount would wait for the device
        bounds = functional.pad(bounds, (0, 1), value=kept.numel())
        self.start, self.end = bounds[member], bounds[member + 1]  # int64 [rows]: of this row's sequence, end behind it
        self.suffix = torch.zeros(kept.numel() + 1, dtype=torch.float64, device=kept.device)

    def sweep(self, begin: int, values: Tensor) -> None:
        """suffix[i] = sum of the values of rows i, i + 1, ... of i's sequence, for the rows from ``begin``."""
        n = values.numel()
        wide = values.double()
        finite = wide.isfinite()
        total = self._suffix(begin, n, torch.where(finite, wide, 0.0))
        lost = self._suffix(begin, n, torch.where(finite, 0.0, 1.0)) > 0.5  # a NaN stays in its own sequence
        carry = torch.where(self.end[begin : begin + n] > begin + n, self.suffix[begin + n], 0.0)
        self.suffix[begin : begin + n] = torch.where(lost, math.nan, total) + carry

    def _suffix(self, begin: int, n: int, values: Tensor) -> Tensor:
        """The same within the tile."""
        running = torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])
        return running[:-1] - running[self.end[begin : begin + n].clamp(max=begin + n) - begin]

    def after(self, rows: Tensor, ends: Tensor) -> Tensor:
        """The sum from ``rows`` on, 0 at the sequence's end."""
        return torch.where(rows < ends, self.suffix[rows], 0.0)


def _swept(t: Tokens, values: Tensor) -> tuple[Sequences, Tensor, Tensor, Tensor]:
    """Sweep this tile; its sequences, row numbers, starts and ends."""
    if t.sequences is None:
        raise RuntimeError("objective: no sequences")
    n = values.numel()
    t.sequences.sweep(t.begin, values)
    rows = torch.arange(t.begin, t.begin + n, device=values.device)
    return t.sequences, rows, t.sequences.start[rows], t.sequences.end[rows]


# --- the terms --------------------------------------------------------------------------------------------------------


def _detached(t: Tokens, weight: Tensor) -> tuple[Tensor, Tensor]:
    """-sg(weight) l"""
    return -weight * t.logprob, weight


def _nll(t: Tokens) -> tuple[Tensor, Tensor]:
    return -t.logprob, torch.ones_like(t.logprob)


def _dft(t: Tokens) -> tuple[Tensor, Tensor]:
    return _detached(t, t.logprob.exp())


def _power(t: Tokens, alpha: float) -> tuple[Tensor, Tensor]:
    return -torch.expm1(alpha * t.logprob) / alpha, (alpha * t.logprob).exp()


def _threshold(t: Tokens, tau: float) -> tuple[Tensor, Tensor]:
    return _detached(t, torch.where(t.logprob.exp() >= tau, 1.0, 0.0 * t.logprob))  # 0 * NaN stays NaN


def _focal(t: Tokens, gamma: float) -> tuple[Tensor, Tensor]:
    return _detached(t, (-torch.expm1(t.logprob)) ** gamma)


def _entropy_gate(t: Tokens, form: str) -> tuple[Tensor, Tensor]:
    if form == "exp":
        return _detached(t, (-t.entropy).exp())
    return _detached(t, t.entropy / math.log(max(t.vocab, 2)))


def _ratio_clip(t: Tokens, epsilon: float) -> tuple[Tensor, Tensor]:
    ratio = t.log_ratio.exp()
    return -ratio.clamp(max=1 + epsilon), torch.where(ratio > 1 + epsilon, 0.0, ratio)


def _hpt(t: Tokens, epsilon: float) -> tuple[Tensor, Tensor]:
    ratio, gains = t.log_ratio.exp(), t.token_weights > 0
    clipped = torch.where(gains, ratio > 1 + epsilon, ratio < 1 - epsilon)
    psi = -torch.where(gains, ratio.clamp(max=1 + epsilon), ratio.clamp(min=1 - epsilon))
    return psi, torch.where(clipped, 0.0, ratio)


def _k3(t: Tokens, beta: float) -> tuple[Tensor, Tensor]:
    d = -t.log_ratio
    return -t.logprob + beta * (torch.expm1(d) - d), 1 + beta * torch.expm1(d)


def _asft(t: Tokens, lam: float, direction: str) -> tuple[Tensor, Tensor]:
    return _dft(t)  # the divergence is over the whole vocabulary: the row kernels form it


def _divergence(log_ratio: Tensor, f: str) -> tuple[Tensor, Tensor]:
    """psi(u) = -(f'(e^u) - f'(1)) / f''(1) and w = -psi'(u); see docs/objectives.md for the derivation."""
    if f == "kl":
        return -log_ratio, torch.ones_like(log_ratio)
    if f == "pearson":
        return -torch.expm1(log_ratio), log_ratio.exp()
    return 2 * torch.expm1(-0.5 * log_ratio), (-0.5 * log_ratio).exp()


def _f_divergence(t: Tokens, f: str, level: str) -> tuple[Tensor, Tensor]:
    if level == "token":
        return _divergence(t.log_ratio, f)
    sequences, _, starts, ends = _swept(t, t.token_weights * t.log_ratio)
    psi, weight = _divergence(sequences.after(starts, ends), f)
    # One loss a sequence, spread evenly; what is multiplied by the token's weight afterwards is divided by it here.
    share = (ends - starts) * t.token_weights.double()
    return (psi / share).float(), weight.float()


def _pear(t: Tokens, block: float, gamma: float, delta_min: float, delta_max: float, log_min: float, log_max: float
          ) -> tuple[Tensor, Tensor]:  # fmt: skip
    sequences, rows, starts, ends = _swept(t, t.log_ratio.clamp(delta_min, delta_max))
    size = int(block)
    after = torch.minimum(starts + ((rows - starts) // size + 1) * size, ends)  # first row behind the token's block
    log_weight = math.log(gamma) * (ends - after) + sequences.after(after, ends)
    return _detached(t, log_weight.clamp(log_min, log_max).exp().float())


def _pear_token(t: Tokens, **arguments: float) -> tuple[Tensor, Tensor]:
    return _pear(t, 1, **arguments)


def _pear_sequence(t: Tokens, delta_min: float, delta_max: float, log_min: float, log_max: float
                   ) -> tuple[Tensor, Tensor]:  # fmt: skip
    sequences, _, starts, ends = _swept(t, t.log_ratio.clamp(delta_min, delta_max))
    return _detached(t, sequences.after(starts, ends).clamp(log_min, log_max).exp().float())


def _iw_sequence(t: Tokens, low: float, high: float) -> tuple[Tensor, Tensor]:
    sequences, _, starts, ends = _swept(t, t.log_ratio)
    return _detached(t, sequences.after(starts, ends).exp().clamp(low, high).float())


_CLIPS = {"delta_min": -0.08, "delta_max": 0.3, "log_min": -10.0, "log_max": 5.0}

OBJECTIVES: dict[str, Objective] = {
    "nll": Objective(_nll),
    "dft": Objective(_dft),
    "power": Objective(_power, {"alpha": 1.0}),
    "threshold": Objective(_threshold, {"tau": 0.1}),
    "focal": Objective(_focal, {"gamma": 2.0}),
    "entropy_gate": Objective(_entropy_gate, {"form": ("exp", "normalized")}),
    "ratio_clip": Objective(_ratio_clip, {"epsilon": 0.2}, needs="ref_logprobs"),
    "hpt": Objective(_hpt, {"epsilon": 0.2}, needs="ref_logprobs"),
    "k3": Objective(_k3, {"beta": 0.1}, needs="ref_logprobs"),
    "pear_token": Objective(_pear_token, {"gamma": 0.999, **_CLIPS}, "suffix", "ref_logprobs"),
    "pear_block": Objective(_pear, {"block": 4.0, "gamma": 0.999, **_CLIPS}, "suffix", "ref_logprobs"),
    "pear_sequence": Objective(_pear_sequence, _CLIPS, "sequence", "ref_logprobs"),
    "iw_sequence": Objective(_iw_sequence, {"low": 0.1, "high": 10.0}, "sequence", "ref_logprobs"),
    "asft": Objective(_asft, {"lam": 0.05, "direction": ("reverse", "forward")}, needs="reference"),
    "f_divergence": Objective(
        _f_divergence, {"f": ("kl", "pearson", "hellinger"), "level": ("token", "sequence")}, needs="ref_logprobs"
    ),
}


# --- arguments --------------------------------------------------------------------------------------------------------


def scope(name: str, arguments: list[float]) -> str:
    """``row``, ``suffix`` or ``sequence``: what a token's weight depends on."""
    if name == "f_divergence" and named(name, arguments)["level"] == "sequence":
        return "sequence"
    return OBJECTIVES[name].scope


def numbers(name: str, given: Mapping[str, Any]) -> list[float]:
    """The arguments as a list of floats in the table's order, a choice by its index: what crosses the dispatcher.

    Raises:
        ValueError: an unknown argument, or a value out of range; the message names it.
    """
    known = OBJECTIVES[name].arguments
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"objective_args: expected for {name!r} only {sorted(known)}, got {unknown}")
    values = []
    for key, default in known.items():
        value = given.get(key, default[0] if isinstance(default, tuple) else default)
        if isinstance(default, tuple):
            if value not in default:
                raise ValueError(f"objective_args[{key!r}]: expected one of {', '.join(default)}, got {value!r}")
            values.append(float(default.index(value)))
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"objective_args[{key!r}]: expected a finite number, got {value!r}")
        _check_range(key, float(value))
        values.append(float(value))
    by_name = dict(zip(known, values, strict=True))
    for low, high in (("delta_min", "delta_max"), ("log_min", "log_max"), ("low", "high")):
        if low in by_name and by_name[low] > by_name[high]:
            raise ValueError(f"objective_args[{low!r}]: expected at most {high} = {by_name[high]}, got {by_name[low]}")
    return values


def _check_range(key: str, value: float) -> None:
    if key in ("alpha", "block") and value <= 0:
        raise ValueError(f"objective_args[{key!r}]: expected more than 0, got {value}")
    if key in ("epsilon", "low", "lam", "beta", "gamma") and value < 0:
        raise ValueError(f"objective_args[{key!r}]: expected at least 0, got {value}")
    if key == "block" and value != int(value):
        raise ValueError(f"objective_args[{key!r}]: expected a whole number, got {value}")


def named(name: str, values: list[float]) -> dict[str, Any]:
    """The inverse of :func:`numbers`."""
    table = OBJECTIVES[name].arguments
    return {
        key: default[int(value)] if isinstance(default, tuple) else value
        for (key, default), value in zip(table.items(), values, strict=True)
    }
