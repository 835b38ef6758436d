"""Packed batches through torch's DataLoader, with forked workers after the parent has used the native thread pool."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fastsft import ops
from fastsft.data.batch import Sample, VarlenBatch
from fastsft.data.loader import PackedLoader
from fastsft.data.store import SampleStore, write_store
from fastsft.data.torch_datasets import PackedDataset, PackedStream

LENGTHS = [5, 9, 1, 12, 3, 7, 7, 2, 11, 4] * 6
SAMPLES = [Sample(np.full(n, i, np.int32), np.ones(n, np.float32), f"s{i}") for i, n in enumerate(LENGTHS)]


def used_pool() -> None:
    ops.minhash_signatures([f"def f{i}(x): return x + {i}" for i in range(2000)])
    torch.randn(64, 64) @ torch.randn(64, 64)


def ids(batches: list[VarlenBatch]) -> list[list[int]]:
    return [b.ids.tolist() for b in batches]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_give_the_batches_of_the_loader(start: str, tmp_path: object) -> None:
    used_pool()
    loader = PackedLoader(write_store(f"{tmp_path}/store", SAMPLES), capacity=24, seed=1)
    dataset = PackedDataset(loader)
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        expected = [loader.batch(epoch, i) for i in range(loader.num_batches(epoch))]
        workers = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=start)
        found = list(workers)
        assert ids(found) == ids(expected)
        assert [b.sources for b in found] == [b.sources for b in expected]
        used_pool()
    with pytest.raises(IndexError, match="batch"):
        dataset[len(dataset)]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_persistent_workers_follow_the_epoch(start: str, tmp_path: object) -> None:
    loader = PackedLoader(write_store(f"{tmp_path}/store", SAMPLES), capacity=24, seed=1)
    dataset = PackedDataset(loader)
    options = {"persistent_workers": True, "multiprocessing_context": start}
    workers = DataLoader(dataset, batch_size=None, num_workers=2, **options)
    for epoch in (0, 1, 5):
        dataset.set_epoch(epoch)
        assert ids(list(workers)) == ids([loader.batch(epoch, i) for i in range(loader.num_batches(epoch))])


@pytest.mark.timeout(120)
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_stream_has_every_sample_once(workers: int) -> None:
    used_pool()
    stream = PackedStream(SAMPLES, capacity=24, open_bins=4)
    options = {"multiprocessing_context": "fork"} if workers else {}
    for _ in range(2):
        batches = list(DataLoader(stream, batch_size=None, num_workers=workers, **options))
        assert sorted(s for b in batches for s in b.sources) == sorted(s.source for s in SAMPLES)
        assert all(b.num_tokens <= 24 for b in batches)
        assert len(batches) <= 1.1 * sum(LENGTHS) / 24 + workers


def test_a_sample_that_is_too_long() -> None:
    with pytest.raises(ValueError, match="length of sequence 3: expected 0 to the capacity 10, got 12"):
        list(PackedStream(SAMPLES, capacity=10))


def test_an_epoch_of_a_store_in_memory() -> None:
    loader = PackedLoader(SampleStore.from_samples(SAMPLES), capacity=30, seed=0)
    dataset = PackedDataset(loader, epoch=2)
    assert len(dataset) == loader.num_batches(2)
    assert sorted(torch.cat([dataset[i].ids for i in range(len(dataset))]).tolist()) == sorted(
        np.concatenate([s.ids for s in SAMPLES]).tolist()
    )
