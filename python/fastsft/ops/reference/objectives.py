"""The training objectives as docs/objectives.md writes them, differentiable by autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch


def objective_loss(
    objective: str,
    args: dict[str, Any],
    logprob: torch.Tensor,
    entropy: torch.Tensor,
    ref: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    sequences: Sequence[Sequence[int]] = (),
    vocab: int = 0,
) -> torch.Tensor:
    """psi per token as docs/objectives.md writes it, sg(.) as detach; ``sequences``: the tokens of each, in order."""
    p = logprob.exp()
    if objective == "nll":
        return -logprob
    if objective == "dft":
        return -p.detach() * logprob
    if objective == "power":
        return (1 - p ** float(args["alpha"])) / float(args["alpha"])
    if objective == "threshold":
        return -(p >= float(args["tau"])).to(p.dtype) * logprob
    if objective == "focal":
        return -((1 - p) ** float(args["gamma"])).detach() * logprob
    if objective == "entropy_gate":
        gate = entropy / math.log(vocab) if args["form"] == "normalized" else torch.exp(-entropy)
        return -gate.detach() * logprob
    if ref is None or weights is None:
        raise ValueError(f"{objective}: needs ref and weights")
    ratio = torch.exp(logprob - ref)
    if objective == "ratio_clip":
        e = float(args["epsilon"])
        return -torch.minimum(ratio, ratio.clamp(1 - e, 1 + e))
    if objective == "hpt":
        e = float(args["epsilon"])
        return -torch.minimum(ratio * weights, ratio.clamp(1 - e, 1 + e) * weights) / weights
    if objective == "k3":
        return -logprob + float(args["beta"]) * (1 / ratio - (ref - logprob) - 1)
    if objective == "f_divergence":
        return _f_divergence(args, logprob - ref, weights, sequences)
    gain = torch.ones_like(logprob)
    for tokens in sequences:
        gain[list(tokens)] = _importance(objective, args, (logprob - ref).detach()[list(tokens)])
    return -gain * logprob


def _importance(objective: str, args: dict[str, Any], u: torch.Tensor) -> torch.Tensor:
    """The weights of one sequence's tokens from its log-ratios, one token after the other."""
    n = len(u)
    if objective == "iw_sequence":
        return u.sum().exp().clamp(float(args["low"]), float(args["high"])).expand(n)
    delta = u.clamp(float(args["delta_min"]), float(args["delta_max"]))
    block = {"pear_token": 1, "pear_block": int(args.get("block", 1)), "pear_sequence": n}[objective]
    logs = []
    for t in range(n):
        last = min((t // block + 1) * block, n)  # the first token behind the token's block
        if objective == "pear_sequence":
            logs.append(delta.sum())
        else:
            logs.append(math.log(float(args["gamma"])) * (n - last) + delta[last:].sum())
    return torch.stack(logs).clamp(float(args["log_min"]), float(args["log_max"])).exp()


def _f_divergence(
    args: dict[str, Any], u: torch.Tensor, weights: torch.Tensor, sequences: Sequence[Sequence[int]]
) -> torch.Tensor:
    """-(f'(rho) - f'(1)) / f''(1) of rho = exp(u), or of a sequence's exp(sum of weight u)."""

    def term(rho: torch.Tensor) -> torch.Tensor:
        psi = {
            "kl": lambda: -torch.log(rho),  # f = x log x: f' = log x + 1, f''(1) = 1
            "pearson": lambda: -(2 * (rho - 1)) / 2,  # f = (x - 1)^2: f' = 2 (x - 1), f''(1) = 2
            "hellinger": lambda: -(1 - rho**-0.5) / 0.5,  # f = (sqrt(x) - 1)^2: f' = 1 - x^(-1/2), f''(1) = 1/2
        }
        return psi[args["f"]]()

    if args["level"] == "token":
        return term(u.exp())
    psi = torch.zeros_like(u)
    for tokens in sequences:
        which = list(tokens)
        psi[which] = term((weights[which] * u[which]).sum().exp()) / (len(which) * weights[which])
    return psi
