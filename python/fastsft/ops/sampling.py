"""Drawing one token per row of logits, reproducibly: the noise is keyed by (seed, position)."""

from __future__ import annotations

from typing import Any

import torch

from fastsft import _C
from fastsft.ops import _library


def _native(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    ids, logprobs = _fake(logits)
    _C.sample(
        logits.contiguous(),
        temperature.contiguous(),
        top_k.contiguous(),
        top_p.contiguous(),
        min_p.contiguous(),
        seeds.contiguous(),
        positions.contiguous(),
        ids,
        logprobs,
    )
    return ids, logprobs


def _fake(logits: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return logits.new_empty(logits.shape[0], dtype=torch.int64), logits.new_empty(logits.shape[0])


_op = _library.define(
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds, "
    "Tensor positions) -> (Tensor, Tensor)",
    fake=_fake,
    cpu=_native,
)


def sample(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws one token per row: argmax over the kept tokens of ``logits / temperature`` + Gumbel noise.

    The noise of token v is a function of (seed, position, v), by Philox, so a draw depends on its own row, parameters,
    seed and position only: not on the batch, the number of threads or the instruction set. The filters apply in the
    order top-k, top-p, min-p, each to what the one before left, as in ``transformers``; the exact rules are in
    ``sampling.h``.

    Args:
        logits: float32 [B, V]; -inf forbids a token.
        temperature: float32 [B], >= 0; 0 takes the most likely token, the lowest index on ties.
        top_k: int32 [B]; 0 is off; tokens that tie with the k-th stay.
        top_p: float32 [B], in (0, 1]; 1 is off.
        min_p: float32 [B], in [0, 1]; 0 is off.
        seeds: int64 [B].
        positions: int64 [B], e.g. the position in the sequence of the token drawn.

    Returns:
        ids int64 [B], and float32 [B]: the log-softmax of the raw logits at these ids.

    Raises:
        ValueError: wrong dtype, shape or range, a NaN or +inf logit, a row of -inf (the message names the row).
    """
    return _op(logits, temperature, top_k, top_p, min_p, seeds, positions)  # type: ignore[no-any-return]
