"""Sampling."""

from __future__ import annotations

import math

import numpy as np
import torch

from fastsft.ops.reference.rng import philox


def gumbel_noise(seed: int, position: int, count: int) -> torch.Tensor:
    """float64 [count]: the noise of tokens 0 .. count - 1 (see ``sampling.h``)."""
    bits = np.array([philox(seed, position, v)[0] for v in range(count)], np.uint32)
    w = np.minimum(((bits >> 1).astype(np.float32) + np.float32(0.5)) * np.float32(2**-31), np.float32(1 - 2**-24))
    return -torch.log(-torch.log1p(-torch.from_numpy(w.astype(np.float64))))


def kept_tokens(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """bool [V]: which tokens of one row, float [V], may be drawn at a temperature > 0."""
    z = (logits - logits.max()).double() / temperature
    kept = z > -math.inf
    if 0 < top_k < len(z):
        kept &= logits >= logits.topk(top_k).values[-1]
    if top_p < 1:
        order = torch.sort(z.masked_fill(~kept, -math.inf), descending=True, stable=True).indices
        share = torch.softmax(z.masked_fill(~kept, -math.inf)[order], 0).cumsum(0)
        kept[order[1:][share[:-1] >= top_p]] = False
    return kept & (z.exp() >= min_p)


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
    """One row after the other, in float64."""
    ids = logits.argmax(-1) if len(logits) else torch.empty(0, dtype=torch.int64)
    for r, row in enumerate(logits):
        if temperature[r] > 0:
            t = float(temperature[r])
            kept = kept_tokens(row, t, int(top_k[r]), float(top_p[r]), float(min_p[r]))
            scores = row.double() / t + gumbel_noise(int(seeds[r]), int(positions[r]), len(row))
            ids[r] = scores.masked_fill(~kept, -math.inf).argmax()
    return ids, torch.log_softmax(logits.double(), -1).gather(1, ids[:, None])[:, 0].float()
