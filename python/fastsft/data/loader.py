"""Packed batches in an order that is a function of (seed, epoch, index): a resumed run seeks, it does not replay."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from fastsft import ops
from fastsft.data.batch import VarlenBatch, collate
from fastsft.data.store import SampleStore


class PackedLoader:
    """Best-fit packing of every sample of a store into batches of at most ``capacity`` tokens, once per epoch.

    Samples are shuffled before packing (so equal lengths meet different neighbours each epoch) and the packed batches
    after it (best-fit decreasing would otherwise put the long ones first).

    Raises:
        ValueError: a sample is longer than ``capacity``, or the store is empty.
    """

    def __init__(self, store: SampleStore, *, capacity: int, seed: int) -> None:
        if len(store) == 0:
            raise ValueError("the sample store is empty: nothing to train on")
        self.store, self.capacity, self.seed = store, capacity, seed
        self._plan = functools.lru_cache(maxsize=2)(self._make_plan)

    def num_batches(self, epoch: int) -> int:
        return len(self._plan(epoch))

    def batch(self, epoch: int, index: int) -> VarlenBatch:
        """Batch ``index`` of ``epoch``, in [0, num_batches(epoch))."""
        return collate([self.store[int(i)] for i in self._plan(epoch)[index]])

    def _make_plan(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        order = rng.permutation(len(self.store))
        packs = ops.pack_sequences(self.store.lengths[order], capacity=self.capacity)
        bins = [order[np.asarray(packs.order[a:b])] for a, b in zip(packs.offsets[:-1], packs.offsets[1:], strict=True)]
        return [bins[i] for i in rng.permutation(len(bins))]


def sequential_batches(store: SampleStore, *, capacity: int) -> list[VarlenBatch]:
    """The store packed once in its own order of lengths, for evaluation."""
    if len(store) == 0:
        return []
    packs = ops.pack_sequences(store.lengths, capacity=capacity)
    return [
        collate([store[int(i)] for i in packs.order[a:b]])
        for a, b in zip(packs.offsets[:-1], packs.offsets[1:], strict=True)
    ]
