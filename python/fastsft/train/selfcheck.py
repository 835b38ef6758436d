"""Proof on a run's own first batch that packing changes nothing: neither the loss nor the gradients."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from fastsft.data.batch import VarlenBatch
from fastsft.data.store import SampleStore
from fastsft.models.decoder import Decoder
from fastsft.train.objective import Objective
from fastsft.train.parallel import Copies

_DOCUMENTS, _TOKENS = 8, 2048
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Relative. In bfloat16 gradients are rounded to 8 bits before they are summed; a leak changes them by more."""


class PackingError(RuntimeError):
    """Documents of one batch have seen each other: a fault of this package, or of a changed model."""


def check_packing(
    model: Decoder,
    objective: Objective,
    store: SampleStore,
    members: npt.NDArray[np.int64],
    parallel: Copies | None = None,
) -> None:
    """Compare some documents in one batch with each in a batch of its own, which is also the finest split of a step.

    The gradients compared are those of the vectors (norms, biases), or of adapters: they stand in every layer, before
    and after its attention, and take next to no memory.

    Args:
        members: numbers of samples; as many are used as stay within 8 documents and 2,048 tokens, but at least two.
        parallel: how several processes hold the model; all of them check the same.

    Raises:
        PackingError: they differ by more than rounding.
    """
    fit = int((np.cumsum(store.lengths[members]) <= _TOKENS).sum())
    members = members[: min(max(fit, 2), _DOCUMENTS)]
    together = store.batch(members)
    divisor = objective.divisor([together])
    if divisor == 0:
        return
    parallel = parallel or Copies(model)
    expected_loss, nll, expected = _gradients(parallel, objective, [store.batch(m[None]) for m in members], divisor)
    if not (math.isfinite(expected_loss) and bool(expected.isfinite().all())):
        return  # the first step will say so, and name the samples
    loss, _, found = _gradients(parallel, objective, [together], divisor)
    scale = max(float(expected.norm()), 1e-30)
    difference = float((found - expected).norm()) / scale
    limit = _TOLERANCE[parallel.dtype]
    # A loss may be a difference: of a divergence from the model itself nothing but rounding is left.
    off = abs(loss - expected_loss) / max(abs(expected_loss), nll, 1e-30)
    if not (difference <= limit and off <= limit):
        raise PackingError(
            f"self-check: {len(members)} samples in one batch and each alone must give the same; the loss differs by "
            f"{off:.1e} and the gradient by {difference:.1e} of itself, {limit:.0e} is allowed. "
            f"Samples: {', '.join(together.sources)}"
        )


def _gradients(
    parallel: Copies, objective: Objective, batches: list[VarlenBatch], divisor: float
) -> tuple[float, float, torch.Tensor]:
    """The summed loss, the same of the negative log-likelihood, and the summed gradients end to end, float32."""
    trained = parallel.named()
    vectors = [(name, p) for name, p in trained if p.ndim == 1] or trained
    total, nll, gradient = 0.0, 0.0, torch.zeros(sum(p.numel() for _, p in vectors))
    names = [name for name, _ in vectors]
    for batch in batches:
        with parallel.training(names):
            loss, aux = objective(parallel.model, batch, divisor=divisor)
            parts = parallel.differentiate(loss, names)
        total += float(loss.detach())
        nll += float((objective.weights(batch) * aux.logprob).abs().sum()) / divisor
        gradient += torch.cat([p.float().flatten() for p in parts])
    return total, nll, gradient
