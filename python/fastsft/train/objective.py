"""A run's loss: the objective of its configuration on packed batches, and what a step's sum is divided by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch

from fastsft import ops
from fastsft.config import ConfigError, ObjectiveOptions, unknown_key
from fastsft.data.batch import VarlenBatch, documents
from fastsft.models.attend import VarlenAttend
from fastsft.models.decoder import Decoder
from fastsft.ops.loss import LossAux
from fastsft.ops.objectives import OBJECTIVES, numbers, scope
from fastsft.train.reference import Reference
from fastsft.train.trained import WideGradients


def check_objective(options: ObjectiveOptions) -> None:
    """Refuse what ``ops.linear_cross_entropy`` would, before any data are read.

    Raises:
        ConfigError: an unknown objective or argument, a value out of range, or what the objective has no use for.
    """
    if options.name not in OBJECTIVES:
        raise ConfigError(unknown_key(f"objective.{options.name}", sorted(OBJECTIVES)))
    try:
        numbers(options.name, options.args)
    except ValueError as error:
        raise ConfigError(f"objective.args: {error}") from None
    if options.label_smoothing and options.name != "nll":
        raise ConfigError(f"objective.label_smoothing: expected 0 beside {options.name!r}: it is for nll")
    if options.reduction == "sequence" and options.name == "f_divergence" and _scope(options) == "sequence":
        raise ConfigError(
            'objective.reduction: expected "token" or "constant": this f_divergence sums by sample itself'
        )
    if options.reference and not OBJECTIVES[options.name].needs:
        raise ConfigError(f"objective.reference: expected none: {options.name!r} compares with nothing")


def _scope(options: ObjectiveOptions) -> str:
    """What a token's weight depends on: its own row, the later ones, or the whole sequence."""
    return scope(options.name, numbers(options.name, options.args))


class Objective:
    """The loss of packed batches.

    With weights w_t and losses l_t of a step's tokens, the reduction ``token`` is sum(w l) / sum |w|, ``sequence`` the
    mean over the samples with trained tokens of that quotient, and ``constant`` sum(w l) / c. Each is a sum over
    micro-batches of terms with the step's divisor, so the split into micro-batches changes nothing.
    """

    def __init__(self, options: ObjectiveOptions, reference: Reference | None = None) -> None:
        self.options = options
        self.reference = reference
        needs = OBJECTIVES[options.name].needs
        if bool(needs) != (reference is not None):
            raise ValueError(f"reference: expected {'one' if needs else 'none'} for {options.name!r}")
        self._over_sequences = _scope(options) != "row"

    def divisor(self, batches: Sequence[VarlenBatch]) -> float:
        """Of a step that has these micro-batches, everywhere; 0 if they have nothing to train on."""
        if self.options.reduction == "constant":
            return cast(float, self.options.constant)
        if self.options.reduction == "sequence":
            return float(sum(int((_document_weights(b) > 0).sum()) for b in batches))
        return sum(float(b.weights.abs().sum(dtype=torch.float64)) for b in batches)

    def describe(self, batches: Sequence[VarlenBatch]) -> str:
        """The objective and its reduction in words; of a constant also what it does to a step of these batches."""
        text = f"{self.options.name}, {describe(self.options)}"
        if self.options.constant is None:
            return text
        weight = sum(float(b.weights.abs().sum(dtype=torch.float64)) for b in batches)
        return f"{text} (the first step's gradient is {weight / self.options.constant:.3g} times the token mean's)"

    def weights(self, batch: VarlenBatch) -> torch.Tensor:
        """float32 [T], what each token's loss is multiplied by before the division."""
        return _per_sequence(batch) if self.options.reduction == "sequence" else batch.weights

    def __call__(
        self,
        model: Decoder,
        batch: VarlenBatch,
        *,
        divisor: float,
        noise: torch.Tensor | None = None,
        accumulate_into: WideGradients | None = None,
        see: Callable[[torch.Tensor, VarlenBatch], None] | None = None,
    ) -> tuple[torch.Tensor, LossAux]:
        """The batch's part of a step's loss, float32 and differentiable, and the figures of its tokens.

        Args:
            divisor: the step's; see :meth:`divisor`.
            noise: [T, D] or None, added to the embeddings.
            accumulate_into: takes the gradients of embedding and head: the head's in this call, the embedding's in the
                backward pass. The parameters get none from autograd.
            see: called with the hidden states [T, D] after the final norm, and the batch.
        """
        o = self.options
        attend = VarlenAttend(batch.cu_seqlens)
        into = accumulate_into or WideGradients()
        hidden_TD = model(batch.ids, batch.position_ids, attend, noise, into.embedding)
        if see is not None:
            see(hidden_TD, batch)
        result = ops.linear_cross_entropy(
            hidden_TD,
            model.lm_head_weight,
            batch.targets,
            self.weights(batch),
            objective=o.name,
            objective_args=o.args,
            cu_seqlens=batch.cu_seqlens if self._over_sequences else None,
            normalizer=divisor,
            label_smoothing=o.label_smoothing,
            z_loss=o.z_loss,
            return_aux=True,
            accumulate_into=into.head,
            max_kept=int((batch.targets >= 0).sum()),
            **(self.reference.inputs(batch) if self.reference else {}),
        )
        return cast(tuple[torch.Tensor, LossAux], result)


def _document_weights(batch: VarlenBatch) -> torch.Tensor:
    """float64 [B], the sum of absolute weights of each document."""
    total = torch.zeros(len(batch.cu_seqlens) - 1, dtype=torch.float64)
    return total.index_add_(0, documents(batch), batch.weights.abs().double())


def _per_sequence(batch: VarlenBatch) -> torch.Tensor:
    """The weights with each document's divided by their sum."""
    total = _document_weights(batch)
    share = torch.where(total > 0, 1 / total, 0.0)[documents(batch)]
    return (batch.weights.double() * share).float()


def describe(options: ObjectiveOptions) -> str:
    """The reduction in words, for logs and checkpoints."""
    return {
        "token": "sum of token weight times loss over the step, divided by the summed token weight",
        "sequence": "mean over the step's samples of each one's weighted mean loss",
        "constant": f"sum of token weight times loss over the step, divided by {options.constant}",
    }[options.reduction]
