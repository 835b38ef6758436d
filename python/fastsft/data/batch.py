"""The packed batch: what every training step consumes. No padding and no mask tensor, only document boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fastsft.data.segments import Segment

if TYPE_CHECKING:
    import torch

IGNORE = -100


@dataclass(frozen=True)
class Sample:
    """One tokenised document: ``weights[i]`` is the loss weight of *predicting* ``ids[i]`` (0 = not trained on).

    ``ids`` int32 [n], ``weights`` float32 [n]. ``source`` says where it came from, for messages ("a.jsonl:12");
    ``origin`` is the number of its entry in ``data.sources``; ``segments`` uint8 [n], what each token is, None if all
    are answer. ``skills``: those of its row.
    """

    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    source: str = ""
    origin: int = 0
    segments: npt.NDArray[np.uint8] | None = None
    skills: tuple[str, ...] = ()


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
    segments: torch.Tensor  # uint8 [T], what each target is
    cu_seqlens: torch.Tensor  # int32 [B + 1]
    sources: tuple[str, ...] = ()  # one per document
    origins: tuple[int, ...] = ()  # of each document, the number of its entry in data.sources
    tokens: npt.NDArray[np.int64] | None = None  # [T], where each token stands in the store it was taken from

    @property
    def num_tokens(self) -> int:
        return int(self.ids.numel())


def documents(batch: VarlenBatch) -> torch.Tensor:
    """int64 [T], the number of each token's document."""
    import torch

    lengths = batch.cu_seqlens.diff().long()
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)


def collate(samples: Sequence[Sample]) -> VarlenBatch:
    """Lay samples end to end, shift the targets, and leave each document's last position untrained."""
    lengths = np.array([len(s.ids) for s in samples], dtype=np.int64)
    ids = np.concatenate([s.ids for s in samples]) if samples else np.zeros(0, np.int32)
    weights = np.concatenate([s.weights for s in samples]) if samples else np.zeros(0, np.float32)
    sources, origins = tuple(s.source for s in samples), tuple(s.origin for s in samples)
    return lay_out(ids, weights, segments_of(samples), lengths, sources, origins)


def segments_of(samples: Sequence[Sample]) -> npt.NDArray[np.uint8]:
    """Of the samples' tokens, end to end."""
    answer = np.uint8(Segment.ANSWER)
    columns = [np.full(len(s.ids), answer) if s.segments is None else s.segments for s in samples]
    return np.concatenate([np.zeros(0, np.uint8), *columns])


def ranges(begins: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The numbers begins[i], begins[i] + 1, ... of each of N ranges, one range after the other."""
    before = np.cumsum(lengths) - lengths
    numbers: npt.NDArray[np.int64] = np.arange(int(lengths.sum())) + np.repeat(begins - before, lengths)
    return numbers


def lay_out(
    ids: npt.NDArray[np.int32],
    weights: npt.NDArray[np.float32],
    segments: npt.NDArray[np.uint8],
    lengths: npt.NDArray[np.int64],
    sources: tuple[str, ...],
    origins: tuple[int, ...],
    tokens: npt.NDArray[np.int64] | None = None,
) -> VarlenBatch:
    """The batch of documents that already stand end to end: ids, weights and segments [T], lengths [B]."""
    import torch

    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    lasts = cu_seqlens[1:][lengths > 0] - 1
    positions = ranges(np.zeros_like(lengths), lengths)
    targets = np.full(len(ids), IGNORE, np.int64)
    shifted = np.zeros(len(ids), np.float32)
    kinds = np.zeros(len(ids), np.uint8)
    targets[:-1] = ids[1:]
    kinds[:-1] = segments[1:]
    shifted[:-1] = weights[1:]
    shifted[lasts] = 0
    targets[shifted == 0] = IGNORE
    return VarlenBatch(
        torch.from_numpy(ids.astype(np.int64)),
        torch.from_numpy(positions),
        torch.from_numpy(targets),
        torch.from_numpy(shifted),
        torch.from_numpy(kinds),
        torch.from_numpy(cu_seqlens.astype(np.int32)),
        sources,
        origins,
        tokens,
    )
