"""Light fine-tuning: the samples that a model finds easy are left out of a stage.

Llama 4's post-training dropped more than half of its tuning data this way, with earlier models as judges; here the
judge is the model that begins the stage, and what it judges by is the loss.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fastsft import ops
from fastsft.config import ConfigError
from fastsft.data.batch import VarlenBatch
from fastsft.data.store import SampleStore
from fastsft.files import sync
from fastsft.models.attend import VarlenAttend
from fastsft.models.decoder import Decoder
from fastsft.train.losses import document_sums
from fastsft.train.parallel import Copies


def choose(
    path: Path,
    parallel: Copies,
    store: SampleStore,
    *,
    share: float,
    capacity: int,
    among: npt.NDArray[np.int64] | None = None,
) -> npt.NDArray[np.bool_]:
    """bool [samples]: all but ``share`` of them, those of the smallest mean loss per unit of token weight.

    The choice is written to ``path``, for a run that goes on in the middle of the stage, with other weights.

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
    parallel.world.from_main(lambda: _write(path, kept))
    return kept


def chosen(path: Path, stage: str) -> npt.NDArray[np.bool_]:
    """What :func:`choose` wrote when the stage began.

    Raises:
        ConfigError: it is lost.
    """
    try:
        kept: npt.NDArray[np.bool_] = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(
            f"{path}: expected the samples that the stage {stage!r} began with, got: {error}. "
            "Remove the checkpoints of this stage, so that it is begun anew"
        ) from None
    return kept


def _write(path: Path, kept: npt.NDArray[np.bool_]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = path.with_name(f".{path.name}.tmp")
    with open(stage, "wb") as file:
        np.save(file, kept)
    sync(stage)
    stage.replace(path)
    sync(path.parent)


def _mean_losses(model: Decoder, batch: VarlenBatch) -> torch.Tensor:
    """float64, of each document [B]: its weighted mean negative log-likelihood; infinite without a trained token."""
    hidden_TD = model(batch.ids, batch.position_ids, VarlenAttend(batch.cu_seqlens))
    logprobs = ops.linear_logprobs(hidden_TD, model.lm_head_weight, batch.targets)
    total, weight = document_sums(batch, logprobs).sum(1).unbind(1)  # type: ignore[arg-type]
    return torch.where(weight > 0, total / weight, torch.inf)
