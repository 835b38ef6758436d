"""MinHash signatures of texts, and the keys of their bands."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastsft import _C
from fastsft.ops import _registry, _texts
from fastsft.ops._texts import Array, Texts


def minhash_signatures(
    texts: Texts, *, num_perm: int = 128, ngram: int = 5, unit: str = "word", seed: int = 0
) -> npt.NDArray[np.uint32]:
    """MinHash signatures (Broder 1997): the share of equal columns of two rows estimates the Jaccard similarity of
    the texts' sets of n-grams, without bias and with variance J (1 - J) / num_perm.

    Texts are read, split and hashed natively, on all threads, without holding the GIL. ASCII capitals count as small
    letters. A *word* is a maximal run of letters, digits, marks and ``_``; characters of scripts written without spaces
    (Han, kana, Thai, Lao, Khmer, Burmese) are a word each; spaces, punctuation and symbols, in ASCII and outside, are
    ignored. As *characters*, runs of ASCII white space count as one space, none at the ends. A text with
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
    matrix = signature_matrix("lsh_keys", signatures)
    if bands < 1 or rows < 1:
        raise ValueError(f"lsh_keys: bands, rows: expected both >= 1, got {bands} and {rows}")
    keys = np.empty((bands, matrix.shape[0]), np.int64)
    _C.lsh_keys(matrix, rows, keys)
    if isinstance(signatures, np.ndarray):
        return keys
    import torch

    return torch.from_numpy(keys)


def signature_matrix(op: str, signatures: Array) -> Array:
    """The signatures, checked and contiguous."""
    is_array = _texts.is_array(signatures)
    if not is_array or _texts.dtype_name(signatures) != "uint32" or signatures.ndim != 2:
        got = f"{signatures.dtype}{list(signatures.shape)}" if is_array else type(signatures)
        raise ValueError(f"{op}: signatures: expected uint32 [N, num_perm], got {got}")
    return np.ascontiguousarray(signatures) if isinstance(signatures, np.ndarray) else signatures.contiguous()


_registry.record(
    "minhash_signatures",
    cpu=_registry.Implementation("native", "C++ kernel"),
    cuda=_registry.Implementation("none", "texts live on the host"),
)
_registry.record(
    "lsh_keys",
    cpu=_registry.Implementation("native", "C++ kernel"),
    cuda=_registry.Implementation("none", "lsh_clusters makes its own there"),
)
