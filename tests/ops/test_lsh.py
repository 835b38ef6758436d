"""LSH over MinHash signatures: bands as datasketch shapes them, clusters against all pairs."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import pytest
import torch
from samples import mutants, noisy_copies

from fastsft import _C, ops
from fastsft.ops import lsh, reference
from fastsft.ops.minhash import lsh_shape

datasketch = pytest.importorskip("datasketch")


@pytest.mark.parametrize("num_perm", [16, 128, 256])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8])
def test_shape_is_the_one_of_datasketch(num_perm: int, threshold: float) -> None:
    theirs = datasketch.MinHashLSH(threshold=threshold, num_perm=num_perm)
    assert lsh_shape(num_perm, threshold) == (theirs.b, theirs.r)


def test_shape_at_the_ends() -> None:
    assert lsh_shape(128, 0.7) == (14, 9)
    assert lsh_shape(1, 0.5) == (1, 1)
    assert lsh_shape(64, 1.0) == (1, 64)
    assert lsh_shape(64, 0.0) == (64, 1)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", [None, (16, 8), (25, 5), (1, 128), (128, 1), (42, 3)])
def test_clusters_equal_all_pairs(seed: int, shape: tuple[int, int] | None) -> None:
    signatures = noisy_copies(np.random.default_rng(seed), 8, 8, 128)
    bands, rows = shape or (None, None)
    for threshold in (0.0, 0.6, 0.7, 0.9, 1.0):
        got = ops.lsh_clusters(signatures, threshold=threshold, bands=bands, rows=rows)
        expected = reference.lsh_clusters(signatures, threshold=threshold, bands=bands, rows=rows)
        assert np.array_equal(got, expected)


def test_clusters_of_a_tensor() -> None:
    signatures = noisy_copies(np.random.default_rng(3), 5, 5, 64)
    got = ops.lsh_clusters(torch.from_numpy(signatures))
    assert isinstance(got, torch.Tensor)
    assert np.array_equal(got.numpy(), ops.lsh_clusters(signatures))


class PlainSteps:
    """What the CUDA kernels behind ``_C.lsh_step`` do, one row at a time: the order of the steps is tested without a
    GPU (the kernels are in tests/cuda_host/lsh_test.cpp)."""

    def __call__(self, step, signatures, parent, duplicate, keys, order, labels, first, count, threshold):  # type: ignore[no-untyped-def]
        rows = signatures.view(torch.int32)
        band = rows[:, first : first + count]

        def root(i: int) -> int:
            while int(parent[i]) != i:
                i = int(parent[i])
            return i

        def link(i: int, j: int) -> bool:
            equal = rows[i] == rows[j]
            if not bool((band[i] == band[j]).all()) or float(equal.float().mean()) < threshold:
                return False
            low, high = sorted((root(i), root(j)))
            parent[high] = low
            return True

        if step == "keys":
            hashes = torch.tensor([hash(tuple(x)) % 7 for x in band.tolist()])
            keys.copy_(torch.where(duplicate, 2**63 - 1, hashes))
        elif step == "labels":
            labels.copy_(torch.tensor([root(i) for i in range(len(rows))]))
        for at in range(len(rows) if step in ("duplicates", "neighbours", "groups") else 0):
            others = range(at) if step == "groups" else range(max(at - 1, 0), at)
            for before in others:
                i, j = int(order[before]), int(order[at])
                together = keys[before] == keys[at] != 2**63 - 1
                assert keys[before] <= keys[at]
                if step == "groups":
                    assert keys[before] != keys[at] or labels[before] <= labels[at]
                    together = together and labels[before] != labels[at]
                if together and step == "duplicates":
                    duplicate[j] = duplicate[j] | (torch.equal(rows[i], rows[j]) and link(i, j))
                elif together:
                    link(i, j)


@pytest.mark.parametrize("shape", [(16, 2), (5, 6), (32, 1)])
@pytest.mark.parametrize("threshold", [0.0, 0.7, 1.0])
def test_order_of_the_steps_on_cuda(shape: tuple[int, int], threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    signatures = noisy_copies(np.random.default_rng(5), 4, 4, 32)
    signatures = np.concatenate([signatures, signatures[:5]])
    expected = ops.lsh_clusters(signatures, threshold=threshold, bands=shape[0], rows=shape[1])
    monkeypatch.setattr(_C, "lsh_step", PlainSteps())
    got = lsh._cuda_clusters(torch.from_numpy(signatures), threshold, *shape)
    assert np.array_equal(got.numpy(), expected)


def test_candidates_are_verified() -> None:
    """One equal band in rows that otherwise differ is no duplicate; chains of links are."""
    rng = np.random.default_rng(0)
    signatures = rng.integers(0, 2**32, (40, 128), np.uint32)
    signatures[:, :9] = 7
    assert np.array_equal(ops.lsh_clusters(signatures), np.arange(40))
    chain = np.repeat(rng.integers(0, 2**32, (1, 128), np.uint32), 5, 0)
    for i in range(1, 5):
        chain[i:, 128 - 25 * i : 128 - 25 * (i - 1)] = i
    assert ops.lsh_clusters(chain, threshold=0.8, bands=14, rows=2).tolist() == [0] * 5
    assert ops.lsh_clusters(chain[[0, 4]], threshold=0.8, bands=14, rows=2).tolist() == [0, 1]


def test_recall_follows_the_banding_formula() -> None:
    """Pairs of similarity s are found with probability 1 - (1 - s^r)^b, among those whose estimate passes."""
    pairs = mutants(4000, seed=5)
    signatures = ops.minhash_signatures([t for pair in pairs for t in pair])
    labels = ops.lsh_clusters(signatures, threshold=0.5, bands=16, rows=8)
    found = labels[0::2] == labels[1::2]
    estimate = (signatures[0::2] == signatures[1::2]).mean(1)
    # Given the estimate, the equal columns are a uniform choice: P(no band) by simulation on shuffled columns.
    rng = np.random.default_rng(0)
    equal = rng.permuted(signatures[0::2] == signatures[1::2], axis=1)
    simulated = equal.reshape(-1, 16, 8).all(-1).any(-1) & (estimate >= 0.5)
    assert abs(found.mean() - simulated.mean()) < 4 * np.sqrt(0.5 / len(pairs))
    assert not found[estimate < 0.5].any()


def test_identical_and_similar_texts_cost_linear_time() -> None:
    rng = np.random.default_rng(1)
    same = np.repeat(rng.integers(0, 2**32, (1, 128), np.uint32), 40_000, 0)
    start = time.perf_counter()
    assert (ops.lsh_clusters(same) == 0).all()
    nearly = same.copy()
    nearly[np.arange(40_000), rng.integers(0, 128, 40_000)] = np.arange(40_000, dtype=np.uint32)
    assert (ops.lsh_clusters(nearly) == 0).all()
    assert time.perf_counter() - start < 10  # quadratic time would be minutes


@pytest.mark.parametrize(
    ("signatures", "options", "message"),
    [
        (np.zeros((2, 8)), {}, r"expected uint32 \[N, num_perm\], got float64\[2, 8\]"),
        (np.zeros(8, np.uint32), {}, r"got uint32\[8\]"),
        (np.zeros((2, 8), np.uint32), {"bands": 2}, "expected both or neither, got 2 and None"),
        (np.zeros((2, 8), np.uint32), {"bands": 3, "rows": 3}, r"bands \* rows <= num_perm = 8, got 3 and 3"),
        (np.zeros((2, 8), np.uint32), {"bands": 0, "rows": 3}, "expected both >= 1"),
        (np.zeros((2, 8), np.uint32), {"threshold": 1.1}, r"threshold: expected a number in \[0, 1\], got 1.1"),
    ],
)
def test_cluster_errors(signatures: npt.NDArray[np.uint32], options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.lsh_clusters(signatures, **options)
