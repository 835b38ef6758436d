"""What goes into the op behind linear_cross_entropy and linear_logprobs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

HIDDEN, WEIGHT, BIAS = 1, 2, 4  # bits of `grads`: which gradients to form


class Inputs(NamedTuple):
    """The op's tensors; per token: [T]. ``grad_weights`` are ``token_weights`` times what scales the gradient."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    token_weights: Tensor
    grad_weights: Tensor
    entropy_grads: Tensor | None = None  # gradient with respect to each row's entropy
    ref_logprobs: Tensor | None = None
    cu_seqlens: Tensor | None = None
    ref_hidden: Tensor | None = None
    ref_weight: Tensor | None = None
    accumulate_into: Tensor | None = None  # float32 [V, H], takes the gradient of weight


class Options(NamedTuple):
    objective: str = "nll"
    arguments: Any = ()  # numbers, as objectives.numbers orders them
    softcap: float = 0.0
    temperature: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    lean: bool = False
    max_kept: int | None = None


PER_TOKEN = ("hidden", "targets", "token_weights", "grad_weights", "entropy_grads", "ref_logprobs", "ref_hidden")


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """float16 gradients stay in float32 until the upstream gradient, which holds the loss scale, is known."""
    return torch.float32 if dtype == torch.float16 else dtype
