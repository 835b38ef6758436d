"""Packed batches as torch datasets, for a ``torch.utils.data.DataLoader`` with or without workers.

Both yield whole batches: ``DataLoader(dataset, batch_size=None, num_workers=4)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.utils.data

from fastsft.data.batch import Sample, VarlenBatch, collate
from fastsft.data.loader import PackedLoader
from fastsft.data.packing import StreamPacker


class PackedDataset(torch.utils.data.Dataset[VarlenBatch]):
    """The batches of one epoch of a :class:`PackedLoader`, by number.

    They are shuffled already, by (seed, epoch): a DataLoader should not shuffle them again. Before another epoch's
    DataLoader iterator is made, call :meth:`set_epoch`; persistent workers follow it.
    """

    def __init__(self, loader: PackedLoader, epoch: int = 0) -> None:
        self.loader = loader
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]  # with workers that live on
        self.set_epoch(epoch)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        self.loader.num_batches(epoch)  # plans it: workers that are forked later have the plan
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return self.loader.num_batches(self.epoch)

    def __getitem__(self, index: int) -> VarlenBatch:
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        return self.loader.batch(self.epoch, index)


class PackedStream(torch.utils.data.IterableDataset[VarlenBatch]):
    """Batches of at most ``capacity`` tokens from samples that come one by one, by :class:`StreamPacker`.

    With n workers, each packs every n-th sample: every sample is in one batch, and which one depends on n.

    Args:
        samples: iterated anew in each worker and each epoch; none may be longer than ``capacity``.
    """

    def __init__(self, samples: Iterable[Sample], *, capacity: int, open_bins: int = 64) -> None:
        self.samples, self.capacity, self.open_bins = samples, capacity, open_bins

    def __iter__(self) -> Iterator[VarlenBatch]:
        worker = torch.utils.data.get_worker_info()
        mine, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        packer = StreamPacker(capacity=self.capacity, open_bins=self.open_bins)
        waiting: dict[int, Sample] = {}
        for number, sample in enumerate(self.samples):
            if number % workers != mine:
                continue
            waiting[packer.taken] = sample
            for members in packer.push(len(sample.ids)):
                yield collate([waiting.pop(member) for member in members])
        for members in packer.flush():
            yield collate([waiting.pop(member) for member in members])
