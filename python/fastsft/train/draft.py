"""Heads for speculative decoding, trained beside the model or on a frozen one (Medusa-1, arXiv 2401.10774).

They learn from hidden states that no gradient goes back through, with the head of the language model held fixed, and
have an optimizer and a norm of their own: the model's bits are those of a run without them.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch

from fastsft import ops
from fastsft.config import Config
from fastsft.data.batch import IGNORE, VarlenBatch, documents
from fastsft.models.decoder import Decoder
from fastsft.models.heads import DraftHeads, save_heads
from fastsft.train.checkpoint import replace_folder
from fastsft.train.optim import make_optimizer
from fastsft.train.trained import restore


def later_targets(batch: VarlenBatch, ahead: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [T] and float32 [T]: of each token the target ``ahead`` places on, with its weight; -100 and 0 where that
    is in another document, not trained, or of a negative weight: what is unlearned is not worth a guess."""
    targets, weights = torch.full_like(batch.targets, IGNORE), torch.zeros_like(batch.weights)
    count = batch.num_tokens - ahead
    if count > 0:
        number = documents(batch).to(targets.device)
        kept = (number[ahead:] == number[:count]) & (batch.weights[ahead:] > 0)
        targets[:count] = torch.where(kept, batch.targets[ahead:], IGNORE)
        weights[:count] = torch.where(kept, batch.weights[ahead:], 0.0)
    return targets, weights


class DraftTraining:
    """The heads of a run and what an optimizer needs to go on with them.

    A step is: :meth:`begin`, :meth:`see` for each micro-batch, and a step of :attr:`optimizer`. The loss of each head
    is the mean over its targets of the whole step, so a split into micro-batches changes rounding only.
    """

    def __init__(self, model: Decoder, config: Config) -> None:
        self._model = model
        head = model.lm_head_weight
        self.heads = DraftHeads(config.draft.heads, model.config.hidden_size).to(head.device, head.dtype)
        self.optimizer = make_optimizer(self.heads, dataclasses.replace(config.optim, kind="adamw"))
        self._divisors = [0.0] * len(self.heads)
        self.losses = [0.0] * len(self.heads)
        """This process's part of each head's mean loss in the step."""

    def begin(self, batches: Sequence[VarlenBatch]) -> None:
        """A step of these micro-batches, in all processes together."""
        self._divisors = [
            sum(float(later_targets(b, i + 1)[1].sum(dtype=torch.float64)) for b in batches)
            for i in range(len(self.heads))
        ]
        self.losses = [0.0] * len(self.heads)

    def see(self, hidden_TD: torch.Tensor, batch: VarlenBatch) -> None:
        """Add the gradients of a micro-batch with these hidden states after the final norm. One head at a time, so
        that the memory is that of one."""
        hidden_TD = hidden_TD.detach()
        for i, divisor in enumerate(self._divisors):
            targets, weights = later_targets(batch, i + 1)
            result = ops.linear_cross_entropy(
                self.heads(hidden_TD, i), self._model.lm_head_weight.detach(), targets, weights, normalizer=divisor
            )
            loss = cast(torch.Tensor, result)
            loss.backward()  # type: ignore[no-untyped-call]
            self.losses[i] += float(loss.detach())
        self.optimizer.collect()

    def state(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs, by name."""
        weights = {f"draft/weight/{name}": p.detach() for name, p in self.heads.named_parameters()}
        return weights | {f"draft/{name}": tensor for name, tensor in self.optimizer.state().items()}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore :meth:`state`, bit for bit.

        Raises:
            ValueError: a tensor is missing, or of another shape or type.
        """
        for name, parameter in self.heads.named_parameters():
            restore(parameter, f"draft/weight/{name}", tensors)
        self.optimizer.load_state({k.removeprefix("draft/"): v for k, v in tensors.items() if k.startswith("draft/")})

    def export(self, output: Path) -> None:
        """Write the heads to ``output/heads``."""
        stage = output / f".heads.tmp-{os.getpid()}"
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()
        save_heads(self.heads, stage, vocab_size=self._model.config.vocab_size)
        replace_folder(stage, output / "heads")
