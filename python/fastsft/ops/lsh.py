"""Clusters of near-duplicates among MinHash signatures: locality-sensitive hashing by bands."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastsft import _C
from fastsft.ops import _library
from fastsft.ops._texts import Array
from fastsft.ops.minhash import lsh_shape, signature_matrix


def _fake_clusters(signatures: torch.Tensor, threshold: float, bands: int, rows: int) -> torch.Tensor:
    return signatures.new_empty(signatures.shape[0], dtype=torch.int64)


def _native_clusters(signatures: torch.Tensor, threshold: float, bands: int, rows: int) -> torch.Tensor:
    labels = _fake_clusters(signatures, threshold, bands, rows)
    _C.lsh_clusters(signatures.contiguous(), threshold, bands, rows, labels)
    return labels


def _cuda_clusters(signatures: torch.Tensor, threshold: float, bands: int, rows: int) -> torch.Tensor:
    """The steps of ``lsh.h``; nothing is read back."""
    n, num_perm = signatures.shape
    if n >= 2**31:
        raise ValueError(f"lsh_clusters: signatures: expected fewer than 2^31 rows on CUDA, got {n}")
    if bands < 1 or rows < 1 or bands * rows > num_perm:
        raise ValueError(
            f"lsh_clusters: bands, rows: expected both >= 1 and bands * rows <= num_perm = {num_perm}, "
            f"got {bands} and {rows}"
        )
    signatures = signatures.contiguous()
    parent = torch.arange(n, dtype=torch.int32, device=signatures.device)
    duplicate = torch.zeros(n, dtype=torch.bool, device=signatures.device)
    keys, labels = (torch.zeros(n, dtype=torch.int64, device=signatures.device) for _ in range(2))

    def step(name: str, order: torch.Tensor, first: int, count: int, sorted_keys: torch.Tensor = keys) -> None:
        placed = labels[order] if name == "groups" else labels
        _C.lsh_step(name, signatures, parent, duplicate, sorted_keys, order, placed, first, count, threshold)

    def link(name: str, first: int, count: int) -> None:
        by_label = labels.argsort(stable=True)
        step("keys", by_label, first, count)
        sorted_keys, places = keys[by_label].sort(stable=True)
        step(name, by_label[places], first, count, sorted_keys)

    link("duplicates", 0, num_perm)
    for name in ("neighbours", "groups"):
        for first in range(0, bands * rows, rows):
            link(name, first, rows)
        step("labels", parent.long(), 0, num_perm)
    return labels


_clusters = _library.define(
    "lsh_clusters(Tensor signatures, float threshold, SymInt bands, SymInt rows) -> Tensor",
    fake=_fake_clusters,
    cpu=_native_clusters,
    cuda=_cuda_clusters,
    cuda_is=_library.ON_CUDA,
)


def lsh_clusters(
    signatures: Array, *, threshold: float = 0.7, bands: int | None = None, rows: int | None = None
) -> Any:
    """Clusters of near-duplicates: locality-sensitive hashing by bands, every candidate pair verified.

    Two texts are linked if their signatures agree in all of some band and in at least ``threshold * num_perm`` columns;
    a cluster is a connected component of these links. Identical signatures cost linear time.

    Args:
        signatures: uint32 [N, num_perm] from :func:`minhash_signatures` or :func:`minhash_token_signatures`, numpy or
            torch.
        threshold: estimated Jaccard similarity from which two texts are linked, in [0, 1].
        bands, rows: the shape of the bands, ``bands * rows <= num_perm``; both or neither. By default
            :func:`lsh_shape`, which finds a pair *at* the threshold only about half the time and surely above it.

    Returns:
        int64 [N], numpy where ``signatures`` is: for each text, the smallest index in its cluster;
        ``labels == arange(N)`` keeps one of each.

    Raises:
        ValueError: wrong dtype or shape, only one of ``bands`` and ``rows``, or a product above num_perm.
    """
    matrix = signature_matrix("lsh_clusters", signatures)
    tensor = torch.from_numpy(matrix) if isinstance(matrix, np.ndarray) else matrix
    if (bands is None) != (rows is None):
        raise ValueError(f"lsh_clusters: bands, rows: expected both or neither, got {bands} and {rows}")
    if bands is None or rows is None:
        bands, rows = lsh_shape(tensor.shape[1], threshold)
    labels = _clusters(tensor, float(threshold), bands, rows)
    return labels.numpy() if isinstance(signatures, np.ndarray) else labels
