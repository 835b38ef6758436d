"""Linear cross-entropy: all logits at once, and the two row kernels."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from fastsft.ops.reference.objectives import objective_loss


def _log_softmax(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = hidden @ weight.T + (0 if bias is None else bias)
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    return torch.log_softmax(logits, -1), torch.logsumexp(logits, -1)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    token_weights: torch.Tensor | None = None,
    *,
    objective: str = "nll",
    objective_args: dict[str, Any] | None = None,
    ref_logprobs: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    reference: tuple[torch.Tensor, torch.Tensor] | None = None,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | None = None,
    softcap: float = 0.0,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """All logits at once, then the formulas, differentiable by autograd. ``objective_args`` must be complete."""
    args = objective_args or {}
    kept = targets != ignore_index
    weights = kept.to(hidden.dtype) if token_weights is None else torch.where(kept, token_weights, 0).to(hidden.dtype)
    rows = weights != 0
    number = (rows.cumsum(0) - 1).tolist()  # of a token among those kept
    bounds = [] if cu_seqlens is None else cu_seqlens.tolist()
    sequences = [[number[t] for t in range(a, b) if rows[t]] for a, b in itertools.pairwise(bounds)]
    hidden, targets, weights = hidden[rows], targets[rows], weights[rows]
    log_p, lse = _log_softmax(hidden, weight, bias, softcap, temperature)
    logprob = log_p.gather(1, targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    ref = None if ref_logprobs is None else ref_logprobs[rows]
    if objective == "asft" and reference is not None:
        log_q, _ = _log_softmax(reference[0][rows], reference[1], None, softcap, temperature)
        a, b = (log_q, log_p) if args["direction"] == "forward" else (log_p, log_q)
        loss = -logprob.exp().detach() * logprob + float(args["lam"]) * (a.exp() * (a - b)).sum(-1)
    else:
        filled = [tokens for tokens in sequences if tokens]
        loss = objective_loss(objective, args, logprob, entropy, ref, weights, filled, weight.shape[0])
    loss = loss + label_smoothing * (logprob - log_p.mean(-1)) + z_loss * lse.square()
    loss = loss * weights
    if reduction == "none":
        return loss.new_zeros(rows.shape).masked_scatter(rows, loss)
    if reduction == "sum":
        return loss.sum()
    divisor = float(weights.sum()) if normalizer is None else normalizer
    return loss.sum() / divisor if divisor else loss.sum() * 0


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    softcap: float = 0.0,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target and entropy, [T] each; 0 at ignored targets."""
    kept = targets != ignore_index
    log_p, _ = _log_softmax(hidden, weight, bias, softcap, temperature)
    logprob = log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return torch.where(kept, logprob, 0), torch.where(kept, -(log_p.exp() * log_p).sum(-1), 0)


def loss_stats(
    logits: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    reference: torch.Tensor | None,
    softcap: float,
    temperature: float,
    forward_divergence: bool,
    stats: torch.Tensor,
) -> None:
    """``loss_stats`` of fastsft/loss.h."""
    _, u = _capped(logits, bias, softcap, temperature)
    log_p = torch.log_softmax(u, -1)
    stats.zero_()
    here = (targets >= 0) & (targets < log_p.shape[1])
    stats[0] = torch.where(here, log_p.gather(1, torch.where(here, targets, 0)[:, None])[:, 0], -torch.inf)
    stats[1] = -torch.xlogy(log_p.exp(), log_p.exp()).sum(-1)
    stats[2] = torch.logsumexp(u, -1)
    stats[3] = log_p.mean(-1)
    if reference is not None:
        v = _capped(reference, None, softcap, temperature)[1]
        log_q = torch.log_softmax(v, -1)
        a, b = (log_q, log_p) if forward_divergence else (log_p, log_q)
        stats[4] = torch.where(a.exp() == 0, 0, a.exp() * (a - b)).sum(-1)
        stats[5] = torch.logsumexp(v, -1)


def loss_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    reference: torch.Tensor | None,
    softcap: float,
    temperature: float,
    stats: torch.Tensor,
    coefficients: torch.Tensor,
) -> None:
    """``loss_gradient`` of fastsft/loss.h, over ``logits``."""
    slope, u = _capped(logits, bias, softcap, temperature)
    log_p = u - stats[2][:, None]
    p = log_p.exp()
    on_p, on_target, uniform, on_plogp, on_plogq, on_q = coefficients[:, :, None]
    gradient = on_p * p + uniform + on_plogp * torch.where(p == 0, 0, p * log_p)
    if reference is not None:
        log_q = _capped(reference, None, softcap, temperature)[1] - stats[5][:, None]
        gradient += on_plogq * torch.where(p == 0, 0, p * log_q) + on_q * log_q.exp()
    here = (targets >= 0) & (targets < log_p.shape[1])
    gradient.scatter_add_(1, torch.where(here, targets, 0)[:, None], torch.where(here[:, None], on_target, 0))
    logits.copy_(gradient * slope)


def _capped(
    logits: torch.Tensor, bias: torch.Tensor | None, softcap: float, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The slope and the value of softcap tanh((logits + bias) / softcap) / temperature."""
    z = logits.float() + (0 if bias is None else bias.float())
    if softcap <= 0:
        return torch.full_like(z, 1 / temperature), z / temperature
    t = torch.tanh(z / softcap)
    return (1 - t * t) / temperature, softcap * t / temperature
