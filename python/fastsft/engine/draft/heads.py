"""Drafts from heads trained beside the model, one token each, from the hidden state that the last token was drawn from.

They are drawn with the noise of the tokens that they guess, as a draft model's are.
"""

from __future__ import annotations

import os

import torch
from torch.nn import functional as F

from fastsft import ops
from fastsft.engine.draft.guess import Guess
from fastsft.engine.draft.noise import draw_alike, draw_others
from fastsft.engine.sequence import Sequence
from fastsft.models.config import ModelConfig
from fastsft.models.device import DeviceDecoder
from fastsft.models.heads import DraftHeads, load_heads
from fastsft.models.packed import PackedDecoder
from fastsft.ops.device_linear import device_linear, hold_weight


class PackedHeads:
    """The heads' matrices, packed as one weight, in front of the model's own language model head.

    Args:
        folder: ``heads`` of a run with ``draft.heads``.
        target: the model; the heads are in the type of its activations.

    Raises:
        ValueError: no such folder, or heads for a model of other sizes.
    """

    def __init__(self, folder: str | os.PathLike[str], target: PackedDecoder) -> None:
        heads = _read(folder, target.config)
        self.count = len(heads)
        self._target = target
        weights, biases = _parameters(heads)
        self._residual = ops.pack_weight(weights, str(target.dtype).removeprefix("torch."))
        self._bias = torch.cat(biases).float()

    @torch.inference_mode()
    def logits(self, hidden_D: torch.Tensor, count: int) -> torch.Tensor:
        """float32 [count, V] of the first heads."""
        changes_KD = ops.packed_linear(hidden_D[None], self._residual, self._bias).view(self.count, -1)[:count]
        rows_KD = hidden_D + F.silu(changes_KD)
        return ops.packed_linear(rows_KD.float(), self._target.weights.head)


class DeviceHeads:
    """The same beside a model on a device."""

    def __init__(self, folder: str | os.PathLike[str], target: DeviceDecoder) -> None:
        heads = _read(folder, target.config)
        self.count = len(heads)
        self._target = target
        weights, biases = _parameters(heads)
        self._residual = hold_weight(weights, str(target.dtype).removeprefix("torch."), target.device)
        self._bias = torch.cat(biases).to(target.device, target.dtype)

    @torch.inference_mode()
    def logits(self, hidden_D: torch.Tensor, count: int) -> torch.Tensor:
        """float32 [count, V] of the first heads."""
        changes_KD = device_linear(hidden_D[None], self._residual, self._bias).view(self.count, -1)[:count]
        return self._target.logits(hidden_D + F.silu(changes_KD))


def _read(folder: str | os.PathLike[str], config: ModelConfig) -> DraftHeads:
    try:
        return load_heads(folder, hidden_size=config.hidden_size, vocab_size=config.vocab_size)
    except ValueError as error:
        raise ValueError(f"speculative_config: model: {error}") from None


def _parameters(heads: DraftHeads) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights and biases of all heads."""
    named = {name: p.detach() for name, p in heads.named_parameters()}
    weights = [p for name, p in named.items() if name.endswith("weight")]
    return weights, [p for name, p in named.items() if name.endswith("bias")]


class HeadsGuess(Guess):
    """Of one text.

    Args:
        branches: places of a proposal for which another guess may be asked.
    """

    def __init__(self, heads: PackedHeads | DeviceHeads, sequence: Sequence, branches: int = 0) -> None:
        self._heads, self._sequence, self._branches = heads, sequence, branches
        self._drawn: list[int] = []  # the latest proposal
        self._logits_KV: torch.Tensor | None = None  # what it was drawn from, for other guesses

    def propose(self, tokens: list[int], limit: int) -> list[int]:
        """As many tokens as there are heads, and at most ``limit``."""
        hidden_D = self._sequence.hidden_D
        if hidden_D is None:  # not drawn yet
            return []
        logits_KV = self._heads.logits(hidden_D, min(limit, self._heads.count))
        self._drawn, self._logits_KV = draw_alike(self._sequence, logits_KV, 0), logits_KV if self._branches else None
        return self._drawn

    def others(self, count: int) -> list[int]:
        logits_KV, self._logits_KV = self._logits_KV, None
        if logits_KV is None or not count:
            return []
        return draw_others(self._sequence, logits_KV[:count], self._drawn[:count])
