"""Speculative sampling by rejection (Leviathan et al. 2211.17192, Chen et al. 2302.01318) of drafts that were drawn.

A draft x, drawn from q, holds with probability min(1, p(x) / q(x)); where it does not, the token is drawn from
max(0, p - q), normalised. So the token follows p, whatever q is.

The random numbers of token t of a request are functions of its seed and t: one stream for the draws of drafts, one for
whether they hold, and the one of plain draws for what replaces them. A guess at t that was never reached told nothing
of the text, so that a later guess may use its numbers again.

Shape suffixes: K drafts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered

import torch

from fastsft import ops
from fastsft.engine.request import SamplingParams
from fastsft.ops.reference.rng import philox
from fastsft.ops.reference.sampling import kept_tokens

_DRAFT_STREAM, _HOLD_STREAM = 1 << 62, 1 << 61  # added to a token's place: beyond all places of plain draws


def distribution(logits_KV: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """float64 [K, V]: what a draw with a temperature above 0 follows, filters included."""
    kept_KV = [kept_tokens(row, params.temperature, params.top_k, params.top_p, params.min_p) for row in logits_KV]
    scaled_KV = logits_KV.double() / params.temperature
    return torch.softmax(scaled_KV.masked_fill(~torch.stack(kept_KV), -torch.inf), -1)


def guess(logits_1V: torch.Tensor, params: SamplingParams, seed: int, place: int) -> tuple[int, torch.Tensor]:
    """A draft, and what it was drawn from: float64 [V]."""
    q_V = distribution(logits_1V, params)[0]
    return _pick(q_V, seed, _DRAFT_STREAM + place), q_V


def judge(
    draft: Ordered[int], q_KV: torch.Tensor, p_KV: torch.Tensor, uniforms: Ordered[float]
) -> tuple[int, torch.Tensor | None]:
    """How many of the drafts hold, and the distribution of the token in place of the first that does not.

    Args:
        q_KV: what each draft was drawn from.
        p_KV: what each token is to follow, given the drafts before it.
        uniforms: independent numbers in (0, 1).
    """
    for i, (token, q_V, p_V, uniform) in enumerate(zip(draft, q_KV, p_KV, uniforms, strict=True)):
        if uniform * float(q_V[token]) >= float(p_V[token]):
            rest_V = (p_V - q_V).clamp(min=0)
            if (total := rest_V.sum()) > 0:  # equal but for rounding: the draft is as good a draw as any
                return i, rest_V / total
    return len(draft), None


def settle(
    draft: Ordered[int], q_KV: torch.Tensor, logits_KV: torch.Tensor, params: SamplingParams, seed: int, place: int
) -> list[int]:
    """The drafts that hold, and the token in place of the first that does not.

    Args:
        logits_KV: float32, of the model, processors applied: before each draft.
        place: of the first draft among the generated tokens.
    """
    uniforms = [uniform_of(seed, place + i) for i in range(len(draft))]
    held, rest_V = judge(draft, q_KV, distribution(logits_KV, params), uniforms)
    if rest_V is None:
        return list(draft)
    return [*draft[:held], _pick(rest_V, seed, place + held)]


def _pick(probs_V: torch.Tensor, seed: int, position: int) -> int:
    one = torch.ones(1, dtype=torch.float32)
    ids, _ = ops.sample(
        probs_V.log().float()[None], temperature=one, top_k=torch.zeros(1, dtype=torch.int32), top_p=one,
        min_p=torch.zeros(1, dtype=torch.float32), seeds=torch.tensor([seed]), positions=torch.tensor([position]),
    )  # fmt: skip
    return int(ids[0])


def uniform_of(seed: int, place: int) -> float:
    """In (0, 1): 53 bits that decide whether the draft in this place holds."""
    low, high, _, _ = philox(seed, _HOLD_STREAM + place, 0)
    return ((high << 32 | low) >> 11) * 2.0**-53 + 2.0**-54
