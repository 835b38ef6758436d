"""Guesses drawn as the tokens are that they stand for: with the same parameters and the same noise."""

from __future__ import annotations

import torch

from fastsft.engine.sampling import draw_rows
from fastsft.engine.sequence import Sequence


def draw_alike(sequence: Sequence, logits_KV: torch.Tensor, place: int) -> list[int]:
    """Guesses at the K tokens of ``sequence`` from the one ``place`` places after its last on."""
    first = sequence.generated + place
    ids, _ = draw_rows(logits_KV, [sequence] * len(logits_KV), range(first, first + len(logits_KV)))
    return ids


def draw_others(sequence: Sequence, logits_KV: torch.Tensor, drawn: list[int]) -> list[int]:
    """The same from the next place on, without those that have been ``drawn`` there."""
    barred_KV = logits_KV.clone()
    barred_KV[range(len(drawn)), drawn] = -torch.inf
    return draw_alike(sequence, barred_KV, 0)
