"""Packed batches in an order that is a function of (seed, epoch, index): a resumed run seeks, it does not replay."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from fastsft import ops
from fastsft.data.batch import VarlenBatch, ranges
from fastsft.data.mixture import Mixture
from fastsft.data.store import SampleStore

_GROUPS = 8  # per batch; see PackedLoader
_LOOSE = 16  # at most every 16th group's samples stay single


class PackedLoader:
    """Best-fit packing of an epoch's samples into batches of at most ``capacity`` tokens.

    An epoch has every sample of the store once, or of each source what :class:`Mixture` draws by ``weights``; with
    ``kept``, bool [N], only the samples for which it is true.

    Best-fit decreasing on single samples would sort them by length, and length goes with kind: batches would be all
    classes here and all one-liners there. So neighbours of a shuffled order are first joined into groups of about an
    eighth of a batch, and the groups are packed. The samples of a few groups stay single, come last and fill the gaps.
    Batches are nearly full and still random.

    Raises:
        ValueError: a sample is longer than ``capacity``, or the store is empty.
    """

    def __init__(
        self,
        store: SampleStore,
        *,
        capacity: int,
        seed: int,
        weights: Sequence[Fraction] | None = None,
        kept: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        if len(store) == 0:
            raise ValueError("the sample store is empty: nothing to train on")
        longest = int(store.lengths.max())
        if longest > capacity:
            raise ValueError(f"capacity: expected at least the longest sample's {longest} tokens, got {capacity}")
        self.store, self.capacity, self.seed = store, capacity, seed
        every = [Fraction(1)] * (int(store.origins.max()) + 1)
        self._mixture = Mixture(store.origins, every if weights is None else weights, seed=seed)
        self._kept = kept
        self._plans: dict[int, list[npt.NDArray[np.int64]]] = {}

    def num_batches(self, epoch: int) -> int:
        """Batches of ``epoch``; may differ by a few from epoch to epoch."""
        return len(self._plan(epoch))

    def batch(self, epoch: int, index: int) -> VarlenBatch:
        """Batch ``index`` of ``epoch``, in [0, num_batches(epoch))."""
        return self.store.batch(self.members(epoch, index))

    def members(self, epoch: int, index: int) -> npt.NDArray[np.int64]:
        """The numbers of the samples of that batch."""
        return self._plan(epoch)[index]

    def _plan(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        """The sample numbers of each batch; of the last two epochs asked for, they are kept."""
        if epoch not in self._plans:
            for old in list(self._plans)[:-1]:
                del self._plans[old]
            self._plans[epoch] = self._make_plan(epoch)
        return self._plans[epoch]

    def _make_plan(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        order = self._mixture.draw(epoch)
        if self._kept is not None:
            order = order[self._kept[order]]
        if len(order) == 0:
            return []
        order = order[rng.permutation(len(order))]
        lengths = self.store.lengths[order]
        starts = np.array(_group(lengths.tolist(), self.capacity // _GROUPS))
        sizes = np.diff(starts, append=len(order))
        packs = ops.pack_sequences(np.add.reduceat(lengths, starts), capacity=self.capacity)
        order = order[ranges(starts[packs.order], sizes[packs.order])]
        bounds = np.concatenate([[0], np.cumsum(sizes[packs.order])])[packs.offsets]
        return [order[bounds[i] : bounds[i + 1]] for i in rng.permutation(len(packs))]


def _group(lengths: list[int], least: int) -> list[int]:
    """Where each group of neighbours begins: as many as stay within ``least`` tokens, or a longer one alone.

    The gaps are about half a sample for each group, so that is about how much stays single.
    """
    loose = max(_LOOSE, least * len(lengths) // max(1, sum(lengths)))
    starts, used, limit, number = [0], lengths[0], max(least, lengths[0]), 0
    for i, length in enumerate(lengths[1:], 1):
        if used + length > limit:
            starts.append(i)
            used, limit, number = 0, max(least, length), number + 1
        elif number % loose == 0:
            starts.append(i)
        used += length
    return starts


def sequential_packs(store: SampleStore, *, capacity: int) -> list[npt.NDArray[np.int64]]:
    """The numbers of the samples of each batch of at most ``capacity`` tokens, or a longer sample; for evaluation."""
    if len(store) == 0:
        return []
    return list(ops.pack_sequences(store.lengths, capacity=max(capacity, int(store.lengths.max()))))
