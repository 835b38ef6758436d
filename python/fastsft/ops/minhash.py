"""MinHash signatures of texts and of token ids, and clusters of near-duplicates."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastsft import _C
from fastsft.ops import _library, _texts
from fastsft.ops._texts import Array, Texts


def minhash_signatures(
    texts: Texts, *, num_perm: int = 128, ngram: int = 5, unit: str = "word", seed: int = 0
) -> npt.NDArray[np.uint32]:
    """MinHash signatures (Broder 1997): the share of equal columns of two rows estimates the Jaccard similarity of
    the texts' sets of n-grams, without bias and with variance J (1 - J) / num_perm.

    Texts are read, split and hashed natively, on all threads, without holding the GIL. ASCII capitals count as small
    letters. A *word* is a maximal run of ASCII letters, digits, ``_`` and any non-ASCII characters; everything between
    words is ignored. As *characters*, runs of ASCII white space count as one space, none at the ends. A text with
    fewer than ``ngram`` units has one n-gram, all of it. A text without any has the signature 0xFFFFFFFF throughout, so
    that all such texts are equal to each other and to nothing else. The hash functions are in ``minhash.h``.

    Args:
        texts: N strings; or their UTF-8 as (data uint8 [bytes], offsets int64 [N + 1]), numpy or torch, which is read
            in place: text i is ``data[offsets[i] : offsets[i + 1]]`` (Arrow's large_string).
        num_perm: columns, i.e. hash functions.
        ngram: units per n-gram.
        unit: "word" or "char". Character 5-grams call most source files similar; prefer words, or long n-grams.
        seed: 0 <= seed < 2^64; signatures are comparable only within one (seed, num_perm, ngram, unit).

    Returns:
        uint32 [N, num_perm]; the same bits on every machine, whatever the number of threads.

    Raises:
        ValueError: an element is not a string or holds a lone surrogate (the message names its index); broken offsets;
            a bad option.
    """
    op = "minhash_signatures"
    chars = _texts.check_unit(op, unit)
    _texts.check_minhash(op, num_perm, seed)
    data, offsets, count = _texts.native(op, texts)
    signatures = np.empty((count, num_perm), np.uint32)
    _C.minhash_signatures(data, offsets, num_perm, ngram, chars, seed, signatures)
    return signatures


def _fake_token_signatures(
    tokens: torch.Tensor, cu_seqlens: torch.Tensor, num_perm: int, ngram: int, seed: int
) -> torch.Tensor:
    return tokens.new_empty((cu_seqlens.shape[0] - 1, num_perm), dtype=torch.uint32)


def _native_token_signatures(
    tokens: torch.Tensor, cu_seqlens: torch.Tensor, num_perm: int, ngram: int, seed: int
) -> torch.Tensor:
    out = _fake_token_signatures(tokens, cu_seqlens, num_perm, ngram, seed)
    cu = cu_seqlens.to(torch.int64).contiguous()
    _C.minhash_token_signatures(tokens.contiguous(), cu, ngram, seed, out)
    return out


_token_signatures = _library.define(
    "minhash_token_signatures(Tensor tokens, Tensor cu_seqlens, SymInt num_perm, SymInt ngram, SymInt seed) -> Tensor",
    fake=_fake_token_signatures,
    cpu=_native_token_signatures,
    cuda=_native_token_signatures,
    cuda_is=_library.ON_CUDA,
)


def minhash_token_signatures(
    tokens: Array, cu_seqlens: Array, *, num_perm: int = 128, ngram: int = 5, seed: int = 0
) -> Any:
    """:func:`minhash_signatures` of documents that are token ids already: the unit is a token.

    A document with fewer than ``ngram`` tokens has one n-gram, all of it; an empty one has the signature 0xFFFFFFFF
    throughout.

    Args:
        tokens: [T] int32 or int64, documents one after the other, torch or numpy; the low 32 bits of an id count.
        cu_seqlens: [N + 1] int32 or int64, document i is ``tokens[cu_seqlens[i] : cu_seqlens[i + 1]]``.
        num_perm: columns, i.e. hash functions.
        ngram: tokens per n-gram; at most 4096 on CUDA.
        seed: 0 <= seed < 2^63; signatures are comparable only within one (seed, num_perm, ngram) and one tokenizer.

    Returns:
        uint32 [N, num_perm], numpy where ``tokens`` is; the same bits on every machine.

    Raises:
        ValueError: a wrong dtype or shape, broken ``cu_seqlens`` (not looked at on CUDA: the signatures are then
            unspecified), a bad option.
    """
    as_numpy = isinstance(tokens, np.ndarray)
    ids, cu = (
        torch.from_numpy(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x for x in (tokens, cu_seqlens)
    )
    op = "minhash_token_signatures"
    for name, x, shape in (("tokens", ids, "[T]"), ("cu_seqlens", cu, "[N + 1]")):
        if x.ndim != 1 or x.dtype not in (torch.int32, torch.int64) or (x is cu and x.numel() == 0):
            raise ValueError(f"{op}: {name}: expected int32 or int64 {shape}, got {x.dtype}{list(x.shape)}")
    if num_perm < 1:
        raise ValueError(f"{op}: num_perm: expected >= 1, got {num_perm}")
    if ngram < 1:
        raise ValueError(f"{op}: ngram: expected >= 1, got {ngram}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"{op}: seed: expected an integer in [0, 2^63), got {seed}")
    out = _token_signatures(ids, cu, num_perm, ngram, seed)
    return out.numpy() if as_numpy else out


def lsh_shape(num_perm: int, threshold: float) -> tuple[int, int]:
    """(bands, rows) that minimise the sum of the areas of false candidates below and missed pairs above ``threshold``.

    Two texts of similarity s share a band with probability ``1 - (1 - s**rows) ** bands``. The same choice as
    datasketch's ``MinHashLSH`` with equal weights.

    Raises:
        ValueError: ``num_perm`` below 1 or ``threshold`` outside [0, 1].
    """
    bands, rows = _C.lsh_shape(num_perm, threshold)
    return int(bands), int(rows)


def lsh_keys(signatures: Array, *, bands: int, rows: int) -> Any:
    """The key of each band of each text: texts whose signatures agree in a band have the same key there.

    What an index keeps and sorts. The formula is in ``lsh.h`` and does not change.

    Args:
        signatures: uint32 [N, num_perm], numpy or torch, on the CPU.
        bands, rows: the shape of the bands, ``bands * rows <= num_perm``; see :func:`lsh_shape`.

    Returns:
        int64 [bands, N], numpy where ``signatures`` is.

    Raises:
        ValueError: wrong dtype or shape, bands or rows below 1, or a product above num_perm.
    """
    matrix = _signatures("lsh_keys", signatures)
    if bands < 1 or rows < 1:
        raise ValueError(f"lsh_keys: bands, rows: expected both >= 1, got {bands} and {rows}")
    keys = torch.empty((bands, matrix.shape[0]), dtype=torch.int64)
    _C.lsh_keys(matrix.contiguous(), rows, keys)
    return keys.numpy() if isinstance(signatures, np.ndarray) else keys


def _signatures(op: str, signatures: Array) -> torch.Tensor:
    is_array = isinstance(signatures, np.ndarray | torch.Tensor)
    if not is_array or signatures.dtype not in (np.uint32, torch.uint32) or signatures.ndim != 2:
        got = f"{signatures.dtype}{list(signatures.shape)}" if is_array else type(signatures)
        raise ValueError(f"{op}: signatures: expected uint32 [N, num_perm], got {got}")
    if isinstance(signatures, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(signatures))
    return signatures


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
    tensor = _signatures("lsh_clusters", signatures)
    if (bands is None) != (rows is None):
        raise ValueError(f"lsh_clusters: bands, rows: expected both or neither, got {bands} and {rows}")
    if bands is None or rows is None:
        bands, rows = lsh_shape(tensor.shape[1], threshold)
    labels = _clusters(tensor, float(threshold), bands, rows)
    return labels.numpy() if isinstance(signatures, np.ndarray) else labels


_library.record(
    "minhash_signatures",
    cpu=_library.Implementation("native", "C++ kernel"),
    cuda=_library.Implementation("none", "texts live on the host"),
)
_library.record(
    "lsh_keys",
    cpu=_library.Implementation("native", "C++ kernel"),
    cuda=_library.Implementation("none", "lsh_clusters makes its own there"),
)
