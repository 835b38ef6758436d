"""Clusters of near-duplicate texts, with exact similarities."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fastsft import _C
from fastsft.ops import _registry, _texts
from fastsft.ops._texts import Texts
from fastsft.ops.minhash import lsh_shape


def near_duplicates(
    texts: Texts,
    *,
    threshold: float = 0.7,
    num_perm: int = 128,
    ngram: int = 5,
    unit: str = "word",
    bands: int | None = None,
    rows: int | None = None,
    verify: bool = True,
    max_cluster: int | None = None,
    seed: int = 0,
    mode: str = "lsh",
) -> npt.NDArray[np.int64]:
    """Clusters of near-duplicates: MinHash signatures, bands, exact verification and connected components in one call.

    Candidates are the pairs of texts whose signatures (:func:`fastsft.ops.minhash_signatures`) agree in all of some
    band. A pair is linked if the Jaccard similarity of the two sets of n-grams is at least ``threshold``: computed, not
    estimated, from 64-bit hashes of the n-grams. A cluster is a connected component of the links. Which pairs become
    candidates is a matter of chance, governed by ``bands`` and ``rows``; that linked pairs are similar is not.

    Everything runs natively, on all threads, without holding the GIL. The clusters do not depend on the order of the
    texts, the number of threads or the machine.

    Args:
        texts: N strings; or their UTF-8 as (data uint8 [bytes], offsets int64 [N + 1]), numpy or torch, which is read
            in place (Arrow's large_string).
        threshold: similarity from which two texts are linked, in [0, 1]. Two texts without any n-gram have 1.
        num_perm, ngram, unit, seed: as for :func:`fastsft.ops.minhash_signatures`.
        bands, rows: the shape of the bands, ``bands * rows <= num_perm``; both or neither. By default
            :func:`fastsft.ops.minhash.lsh_shape`.
        verify: False links every candidate pair.
        max_cluster: limit of the distinct sets of n-grams in one cluster. A component above it is made anew, as stars
            around centres: in the order of the texts' hashes, each text joins the most similar centre (the first of
            equally similar ones) that it is linked with and whose star has room, or else becomes a centre. What is
            linked with its centre is similar to it, while a chain of links joins texts with nothing in common.
            None: no limit.
        mode: "lsh", or "all_pairs": no pair is missed (:func:`fastsft.ops.similar_pairs`), for a few times the time;
            ``threshold`` is above 0 then, and ``num_perm``, ``bands``, ``rows``, ``verify`` and ``seed`` play no part.

    Returns:
        int64 [N]: for each text, the smallest index in its cluster; ``labels == arange(N)`` keeps one of each.

    Raises:
        ValueError: an element is not a string or holds a lone surrogate (the message names its index); broken offsets;
            a bad option.
    """
    op = "near_duplicates"
    chars = _texts.check_unit(op, unit)
    limit = _texts.check_max_cluster(op, max_cluster)
    if mode not in ("lsh", "all_pairs"):
        raise ValueError(f"{op}: mode: expected 'lsh' or 'all_pairs', got {mode!r}")
    data, offsets, count = _texts.native(op, texts)
    labels = np.empty(count, np.int64)
    if mode == "all_pairs":
        _C.all_pairs_clusters(data, offsets, ngram, chars, float(threshold), limit, labels)
        return labels
    _texts.check_minhash(op, num_perm, seed)
    _check_threshold(op, threshold)
    if (bands is None) != (rows is None):
        raise ValueError(f"{op}: bands, rows: expected both or neither, got {bands} and {rows}")
    if bands is None or rows is None:
        bands, rows = lsh_shape(num_perm, threshold)
    _C.near_duplicates(
        data, offsets, num_perm, ngram, chars, seed, bands, rows, float(threshold), verify, limit, labels
    )
    return labels


def link_similar(
    texts: Texts,
    members: npt.NDArray[np.int64],
    bucket_offsets: npt.NDArray[np.int64],
    parent: npt.NDArray[np.int64],
    *,
    threshold: float = 0.7,
    ngram: int = 5,
    unit: str = "word",
    rows: npt.NDArray[np.int64] | None = None,
    max_cluster: int | None = None,
) -> None:
    """The last step of :func:`near_duplicates`, for candidates found elsewhere: join what is exactly similar.

    ``parent`` is a union-find forest over R rows, ``arange(R)`` at the start, and is changed in place: ``parent[r] <=
    r`` leads, step by step, to the smallest row of r's component. Pairs connected already are not compared, so that
    candidates may come in any number of calls, each with the texts it needs; the components do not depend on the
    division or the order.

    Args:
        texts: M texts, in the forms that :func:`near_duplicates` takes.
        members, bucket_offsets: int64 [K], int64 [B + 1]: any two of the texts ``members[bucket_offsets[b] :
            bucket_offsets[b + 1]]`` are candidates.
        parent: int64 [R], writable.
        threshold, ngram, unit: as for :func:`near_duplicates`.
        rows: int64 [M]: the row of each text; by default row i is text i.
        max_cluster: as for :func:`near_duplicates`; then this one call must have all candidates of its rows, none of
            them connected before.

    Raises:
        ValueError: a text, offset, member, row or parent out of range; a bad option.
    """
    op = "link_similar"
    chars = _texts.check_unit(op, unit)
    _check_threshold(op, threshold)
    limit = _texts.check_max_cluster(op, max_cluster)
    if isinstance(parent, np.ndarray) and not parent.flags.writeable:
        raise ValueError(f"{op}: parent: expected a writable array, got a read-only one")
    data, offsets, _ = _texts.native(op, texts)
    _C.link_similar(data, offsets, members, bucket_offsets, rows, parent, float(threshold), ngram, chars, limit)


def _check_threshold(op: str, threshold: float) -> None:
    if not 0 <= threshold <= 1:
        raise ValueError(f"{op}: threshold: expected a number in [0, 1], got {threshold}")


for _name in ("near_duplicates", "link_similar"):
    _registry.record(
        _name,
        cpu=_registry.Implementation("native", "C++ kernel"),
        cuda=_registry.Implementation("none", "texts live on the host"),
    )
