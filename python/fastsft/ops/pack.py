"""Packing of sequences into bins of fixed capacity (batches without padding)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fastsft import _C
from fastsft.ops import _registry

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Packs:
    """Bin ``b`` holds the sequences ``order[offsets[b] : offsets[b + 1]]``."""

    order: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, b: int) -> npt.NDArray[np.int64]:
        if not 0 <= b < len(self):
            raise IndexError(f"bin {b} of {len(self)}")
        return self.order[self.offsets[b] : self.offsets[b + 1]]

    def __iter__(self) -> Iterator[npt.NDArray[np.int64]]:
        return (self[b] for b in range(len(self)))


def pack_sequences(lengths: Sequence[int] | npt.NDArray[np.integer] | torch.Tensor, *, capacity: int) -> Packs:
    """Best-fit decreasing bin packing.

    Sequences are taken longest first (equal lengths by ascending index); each goes into the bin that it leaves fullest,
    the lowest-numbered one if several tie, or opens a new bin if it fits nowhere. At most 11/9 of the optimal number of
    bins plus a constant (Johnson 1973); on sequence lengths of real corpora the bins are over 99 % full.

    Args:
        lengths: N integers, each in 0..capacity; a length of 0 is legal and takes no room.
        capacity: room in a bin, at least 1.

    Returns:
        :class:`Packs` of int64 arrays; within a bin, sequences stand in the order in which they were placed.

    Raises:
        ValueError: a length is negative or above the capacity (the message names its index), or not an integer.
    """
    values = np.asarray(lengths)
    if values.size == 0:
        values = values.astype(np.int64)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise ValueError(f"pack_sequences: lengths: expected [N] integers, got {values.dtype}{list(values.shape)}")
    values = np.ascontiguousarray(values, dtype=np.int64)
    order = np.empty(len(values), np.int64)
    offsets = np.empty(len(values) + 1, np.int64)
    bins = _C.pack_best_fit(values, capacity, order, offsets)
    return Packs(order, offsets[: bins + 1].copy())


_registry.record(
    "pack_sequences",
    cpu=_registry.Implementation("native", "C++ kernel"),
    cuda=_registry.Implementation("none", "works on lengths, which live on the host"),
)
