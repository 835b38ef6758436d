"""Light fine-tuning: the samples that a model finds easy are left out of a stage.

Llama 4's post-training dropped more than half of its tuning data this way, with earlier models as judges; here the
judge is the model that begins the stage, and what it judges by is the loss.
"""

from __future__ import annotations

import base64

import numpy as np
import numpy.typing as npt
import torch

from fastsft import ops
from fastsft.data.batch import VarlenBatch
from fastsft.data.store import SampleStore
from fastsft.models.decoder import Decoder
from fastsft.train.evaluate import batch_logprobs
from fastsft.train.losses import document_sums
from fastsft.train.parallel import Copies


def choose(
    parallel: Copies,
    store: SampleStore,
    *,
    share: float,
    capacity: int,
    among: npt.NDArray[np.int64] | None = None,
) -> npt.NDArray[np.bool_]:
    """bool [samples]: all but ``share`` of them, those of the smallest mean loss per unit of token weight.

    Args:
        among: numbers of the samples to choose from, and to take the share of; the others are not kept. None: all.
    """
    among = np.arange(len(store)) if among is None else among
    losses = torch.zeros(len(among), dtype=torch.float64)
    lengths = store.lengths[among]
    packs = list(ops.pack_sequences(lengths, capacity=max(capacity, int(lengths.max()))))
    with parallel.inference():
        for number, counts in parallel.turns(len(packs)):
            found = _mean_losses(parallel.model, store.batch(among[packs[number]]))
            if counts:
                losses[packs[number]] = found
    parallel.world.sum_([losses])
    kept = np.zeros(len(store), bool)
    kept[among[np.argsort(losses.numpy(), kind="stable")[int(share * len(among)) :]]] = True
    return kept


def packed(kept: npt.NDArray[np.bool_]) -> str:
    """The choice as text, eight samples a byte: it goes into checkpoints, for a run that goes on in the middle of the
    stage with other weights than those that chose."""
    return base64.b64encode(np.packbits(kept).tobytes()).decode("ascii")


def unpacked(text: str, count: int) -> npt.NDArray[np.bool_]:
    """What :func:`packed` made of ``count`` samples."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=count).astype(bool)


def _mean_losses(model: Decoder, batch: VarlenBatch) -> torch.Tensor:
    """float64, of each document [B]: its weighted mean negative log-likelihood; infinite without a trained token."""
    total, weight = document_sums(batch, batch_logprobs(model, batch)).sum(1).unbind(1)
    return torch.where(weight > 0, total / weight, torch.inf)
