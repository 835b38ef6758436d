"""One optimizer step: micro-batches in, gradients summed, checked, applied."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastsft.data.batch import VarlenBatch
from fastsft.models.decoder import Decoder
from fastsft.train.draft import DraftTraining
from fastsft.train.losses import Sums, added, by_group
from fastsft.train.objective import Objective
from fastsft.train.optim import MasterOptimizer
from fastsft.train.parallel import Copies, idle


class NonFiniteError(FloatingPointError):
    """A NaN or infinite loss or gradient. The weights are those before the step named in the message."""


@dataclass(frozen=True)
class StepResult:
    """``groups``: by source and segment, the weighted sum of negative log-likelihood and of weights.
    ``optimizer_seconds``: of the sum over processes, the norm and the update. ``draft_losses``: each draft head's."""

    loss: float
    grad_norm: float
    groups: Sums
    optimizer_seconds: float
    draft_losses: tuple[float, ...] = ()


class Update:
    """Forward and backward over a step's micro-batches, then the optimizer.

    The loss is divided by what all the micro-batches give together, so any split of a step, over micro-batches and over
    processes, gives the same gradient.
    """

    def __init__(
        self,
        model: Decoder,
        optimizer: MasterOptimizer,
        objective: Objective,
        *,
        seed: int,
        parallel: Copies | None = None,
        draft: DraftTraining | None = None,
    ) -> None:
        self.model, self.optimizer, self.objective = model, optimizer, objective
        self._parallel = parallel or Copies(model)
        self._seed, self._draft = seed, draft

    def __call__(self, step: int, batches: Sequence[VarlenBatch], rate: float, draft_rate: float = 0.0) -> StepResult:
        """Step number ``step``, counted from 0, with the learning rate ``rate``, and ``draft_rate`` of the draft heads.

        Args:
            batches: all of the step, in every process; each runs its share.

        Raises:
            NonFiniteError: before anything was changed, in all processes.
        """
        divisor = self.objective.divisor(batches)
        total, seen, fault = 0.0, [], None
        into = self._parallel.wide_gradients(self.optimizer)
        draft = self._draft
        if draft:
            draft.begin(batches)
        for index, counts in self._parallel.turns(len(batches)):
            batch = batches[index] if counts else idle(batches[index])
            noise = self._noise(step, index, batch)
            loss, aux = self.objective(
                self.model, batch, divisor=divisor, noise=noise, accumulate_into=into, see=draft.see if draft else None
            )
            value = float(loss.detach())
            if not math.isfinite(value) and fault is None:
                fault = _fault(step, [batch], f"loss is {value}")
                if self._parallel.world.size == 1:
                    break
            if loss.requires_grad:  # not of a frozen model, whose draft heads alone are trained
                loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.collect()
            total += value
            seen.append((batch, aux))
        guessed = draft.losses if draft else []
        found = self._parallel.world.gather((total, by_group(seen), fault, guessed))
        losses, groups, faults, guesses = zip(*found, strict=True)
        self._stop_at(next(filter(None, faults), None))
        began = time.perf_counter()
        self._parallel.sum_gradients(self.optimizer)
        norm = self._parallel.grad_norm(self.optimizer)
        if not math.isfinite(float(norm)):
            self._stop_at(_fault(step, batches, f"gradient norm is {float(norm)}"))
        if draft:
            self._parallel.sum_gradients(draft.optimizer)
            draft_norm = draft.optimizer.grad_norm()
            if not math.isfinite(float(draft_norm)):
                self._stop_at(_fault(step, batches, f"gradient norm of the draft heads is {float(draft_norm)}"))
            draft.optimizer.step(draft_rate, draft_norm)
        self.optimizer.step(rate, norm)
        each = tuple(map(sum, zip(*guesses, strict=True)))
        return StepResult(sum(losses), float(norm), added(groups), time.perf_counter() - began, each)

    def _noise(self, step: int, index: int, batch: VarlenBatch) -> torch.Tensor | None:
        """NEFTune's, a function of (seed, step, number of the micro-batch)."""
        alpha = self.objective.options.neftune
        if not alpha:
            return None
        size = self.model.config.hidden_size
        generator = torch.Generator().manual_seed(_mixed(self._seed, step, index))
        noise = torch.rand(batch.num_tokens, size, generator=generator).mul_(2).sub_(1)
        lengths = batch.cu_seqlens.diff().long()
        bound = alpha / torch.sqrt(torch.repeat_interleave(lengths, lengths).float() * size)
        return noise.mul_(bound[:, None]).to(self._parallel.dtype)

    def _stop_at(self, fault: str | None) -> None:
        if fault is not None:
            self.optimizer.zero_grad()
            if self._draft:
                self._draft.optimizer.zero_grad()
            raise NonFiniteError(fault)


def _fault(step: int, batches: Sequence[VarlenBatch], what: str) -> str:
    sources = [s for b in batches for s in b.sources]
    shown = ", ".join(sources[:20]) + (f" and {len(sources) - 20} more" if len(sources) > 20 else "")
    return f"step {step + 1}: {what}; stopped before the update. Samples of the batch: {shown}"


def _mixed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
