"""The packed batch: what every training step consumes. No padding and no mask tensor, only document boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

IGNORE = -100


@dataclass(frozen=True)
class Sample:
    """One tokenised document: ``weights[i]`` is the loss weight of *predicting* ``ids[i]`` (0 = not trained on).

    ``ids`` int32 [n], ``weights`` float32 [n]. ``source`` says where it came from, for messages ("a.jsonl:12").
    """

    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    source: str = ""


@dataclass(frozen=True)
class VarlenBatch:
    """B documents end to end on one axis of T tokens.

    ``targets[t]`` is the token after ``ids[t]`` in the same document, or -100 where nothing is trained (always at a
    document's end); ``weights[t]`` is that target's loss weight. ``position_ids`` restart at 0 in each document.
    """

    ids: torch.Tensor  # int64 [T]
    position_ids: torch.Tensor  # int64 [T]
    targets: torch.Tensor  # int64 [T]
    weights: torch.Tensor  # float32 [T]
    cu_seqlens: torch.Tensor  # int32 [B + 1]
    sources: tuple[str, ...] = ()  # one per document

    @property
    def num_tokens(self) -> int:
        return int(self.ids.numel())


def collate(samples: Sequence[Sample]) -> VarlenBatch:
    """Lay samples end to end, shift the targets, and leave each document's last position untrained."""
    lengths = np.array([len(s.ids) for s in samples], dtype=np.int64)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    total = int(cu_seqlens[-1])
    ids = np.concatenate([s.ids for s in samples]).astype(np.int64) if samples else np.zeros(0, np.int64)
    weights = np.zeros(total, np.float32)
    targets = np.full(total, IGNORE, np.int64)
    positions = np.arange(total, dtype=np.int64)
    for s, begin, end in zip(samples, cu_seqlens[:-1], cu_seqlens[1:], strict=True):
        positions[begin:end] -= begin
        if end > begin:
            targets[begin : end - 1] = ids[begin + 1 : end]
            weights[begin : end - 1] = s.weights[1:]
    targets[weights == 0] = IGNORE
    return VarlenBatch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        torch.from_numpy(targets),
        torch.from_numpy(weights),
        torch.from_numpy(cu_seqlens.astype(np.int32)),
        tuple(s.source for s in samples),
    )
