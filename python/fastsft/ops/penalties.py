"""Penalties on the tokens that a text already has."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from fastsft import _C


def penalise(
    logits: torch.Tensor,
    tokens: npt.NDArray[np.int32],
    *,
    prompt: int,
    first: int,
    repetition: float = 1.0,
    frequency: float = 0.0,
    presence: float = 0.0,
) -> None:
    """Changes in place the logits of the rows that continue one text; work follows the tokens, not the vocabulary.

    Row r continues ``tokens[: first + r]``. The logit of each token of it is divided by ``repetition`` where it is
    positive and multiplied by it otherwise (CTRL, 1909.05858); then a token that occurs c > 0 times past the prompt
    loses ``frequency * c + presence``.

    Args:
        logits: float32 [R, V], contiguous, on the CPU.
        tokens: int32 [first + R - 1].
        prompt: how many of the tokens are the prompt, at most ``first``.

    Raises:
        ValueError: wrong dtype or shape, a token outside the vocabulary, ``repetition`` that is not positive.
    """
    _C.penalise(logits, tokens, prompt, first, repetition, frequency, presence)
