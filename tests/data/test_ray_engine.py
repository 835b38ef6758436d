"""Deduplication on a Ray cluster of several processes against one machine."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dedup_cases import lines_of, rows_of, texts

from fastsft import ops
from fastsft.data.dedup_files import dedup_files
from fastsft.data.link import LinkOptions
from fastsft.data.problems import DataError, Problems
from fastsft.data.ray_engine import join
from fastsft.data.scan import SketchOptions


def test_join() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        n = int(rng.integers(1, 60))
        parent = np.arange(n)
        label = list(range(n))
        for _ in range(3):
            pairs = rng.integers(0, n, (int(rng.integers(0, n)), 2))
            join(parent, pairs[:, 0], pairs[:, 1])
            for a, b in pairs.tolist():
                label = [min(label[a], label[b]) if x in (label[a], label[b]) else x for x in label]
        assert parent.tolist() == label


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    # without a size Ray reserves 30 % of the memory, and /dev/shm may hold less
    ray.init(num_cpus=3, object_store_memory=1 << 28, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.mark.timeout(600)
def test_the_same_as_on_one_machine(cluster: Any, tmp_path: Path) -> None:
    all_texts = texts(3000)
    cuts = [0, 900, 1000, 2200, 3000]
    paths = [tmp_path / f"part{i}.jsonl{'.gz' if i % 2 else ''}" for i in range(4)]
    for path, a, b in zip(paths, cuts, cuts[1:], strict=False):
        data = lines_of(rows_of(all_texts[a:b])) + b"{broken\n"
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    for name, limit in (("any", None), ("few", 3)):
        how = LinkOptions(max_cluster=limit)
        problems = Problems("skip")
        local = dedup_files(paths, tmp_path / f"local-{name}", Problems("skip"), sketch=SketchOptions(), how=how)
        there = dedup_files(
            paths, tmp_path / f"ray-{name}", problems, sketch=SketchOptions(), how=how, memory=1 << 26,
            work=tmp_path / "work", engine="ray",
        )  # fmt: skip
        assert np.array_equal(there.labels, ops.near_duplicates(all_texts, max_cluster=limit))
        assert np.array_equal(there.labels, local.labels)
        assert problems.counts == {"broken JSON": 4}
        for path in paths:
            ours, theirs = tmp_path / f"local-{name}" / path.name, tmp_path / f"ray-{name}" / path.name
            assert ours.read_bytes() == theirs.read_bytes()
    with pytest.raises(DataError, match=r"^[^\n]*part0\.jsonl:901: broken JSON[^\n]*$"):
        dedup_files(
            paths, None, Problems("fail"), sketch=SketchOptions(), how=how, memory=1 << 26, work=tmp_path / "work",
            engine="ray",
        )  # fmt: skip
