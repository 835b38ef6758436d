"""Temporary: plain torch, until the native kernels land."""

from __future__ import annotations

from typing import Any

import torch


def linear_cross_entropy(
    hidden: Any,
    weight: Any,
    targets: Any,
    token_weights: Any = None,
    *,
    reduction: str = "mean",
    normalizer: Any = None,
    ignore_index: int = -100,
    **_: Any,
) -> Any:
    logits = (hidden @ weight.T).float()
    w = torch.ones_like(logits[:, 0]) if token_weights is None else token_weights
    w = torch.where(targets == ignore_index, 0.0, w)
    nll = torch.nn.functional.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none") * w
    if reduction == "none":
        return nll
    if reduction == "sum":
        return nll.sum()
    n = w.sum() if normalizer is None else normalizer
    return nll.sum() / (n if n else 1.0)


def linear_logprobs(hidden: Any, weight: Any, targets: Any, **_: Any) -> Any:
    return torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
