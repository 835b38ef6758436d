"""What TRL's ``ChunkedLogProbFunction`` computes, by :func:`fastsft.ops.linear_logprobs`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastsft import ops

_TILE_BYTES = 64 << 20  # of logits, where they have to be looked at once more


class LogProbFunction:
    """Has the ``apply`` of TRL's class, with its arguments and its five results; is no autograd.Function itself."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """
        Args:
            hidden: [N, H].
            weight: [V, H]; bias: [V].
            targets: int64 [N].
            temperature: divides the logits after the scale and the cap.
            chunk_size: ignored; tiles have sizes of their own.
            outputs: which results to compute besides the log-probabilities.

        Returns:
            Log-probability and entropy of each row, both differentiable; logarithm of the summed squared probabilities,
            mean logit, and whether the target is the first largest. Float32 (bool) [N], None where not asked for. The
            last three cost one more product with the weight.

        Raises:
            ValueError: the weight is partitioned by DeepSpeed ZeRO-3, which would have to gather it in backward too.
        """
        del chunk_size
        if hasattr(weight, "ds_id"):
            raise ValueError("fastsft log-probabilities: weight: expected a whole tensor, got one of DeepSpeed ZeRO-3")
        if not torch.is_autocast_enabled(hidden.device.type):
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        softcap = final_logit_softcapping or 0.0
        if softcap and logit_scale != 1.0:
            bias = None if bias is None else bias * logit_scale
            hidden, logit_scale = hidden * logit_scale, 1.0
        temperature = temperature / logit_scale
        logprobs, entropy = ops.linear_logprobs(
            hidden, weight, targets, bias=bias, softcap=softcap, temperature=temperature, return_entropy=True
        )
        squares, mean, top = looked_at_once_more(
            hidden, weight, targets, bias=bias, softcap=softcap, temperature=temperature, outputs=outputs
        )
        return logprobs, entropy if "entropy" in outputs else None, squares, mean, top


@torch.no_grad()
def is_top1(
    hidden: Tensor, weight: Tensor, targets: Tensor, logprob: Tensor, entropy: Tensor, **options: Any
) -> Tensor:
    """bool [N]: whether the target is the first largest logit, from logits of those rows alone that leave it open.

    A probability above a half is the largest; one below exp(-entropy) is not: entropy is the mean of -log p, and the
    likeliest has the least.
    """
    slack = 1e-3  # for what is rounded
    found = logprob > math.log(0.5) + slack
    unsure = (~found & (logprob >= -entropy - slack)).nonzero()[:, 0]
    _, _, right = looked_at_once_more(hidden[unsure], weight, targets[unsure], outputs=("is_top1",), **options)
    return found.index_copy(0, unsure, right)  # type: ignore[arg-type]


@torch.no_grad()
def looked_at_once_more(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    temperature: float = 1.0,
    outputs: tuple[str, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``log_sum_sq_probs``, ``mean_logits`` and ``is_top1``, each if named, from logits made tile by tile."""
    wanted = [name in outputs for name in ("log_sum_sq_probs", "mean_logits", "is_top1")]
    if not any(wanted):
        return None, None, None
    found: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    step = max(1, _TILE_BYTES // (4 * weight.shape[0]))
    for begin in range(0, max(hidden.shape[0], 1), step):
        rows = slice(begin, begin + step)
        logits = ops.linear(hidden[rows], weight, bias)
        if wanted[2]:
            found[2].append(logits.argmax(-1) == targets[rows])
        if wanted[0] or wanted[1]:
            logits = logits.float()
            logits = (softcap * torch.tanh(logits / softcap) if softcap else logits) / temperature
            found[1].append(logits.mean(-1))
            found[0].append(torch.logsumexp(2 * logits, -1) - 2 * torch.logsumexp(logits, -1))
    squares, mean, top = (torch.cat(x) if w else None for x, w in zip(found, wanted, strict=True))
    return squares, mean, top
