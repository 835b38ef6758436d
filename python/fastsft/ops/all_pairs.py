"""Every pair of similar texts: a similarity join."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fastsft import _C
from fastsft.ops import _registry, _texts
from fastsft.ops._texts import Texts


def similar_pairs(
    texts: Texts, *, threshold: float = 0.7, ngram: int = 5, unit: str = "word"
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """All pairs of texts whose sets of n-grams have a Jaccard similarity of at least ``threshold``: none is missed.

    A similarity join with prefix, length and positional filters (Bayardo, Ma, Srikant, WWW 2007; Xiao, Wang, Lin, Yu,
    WWW 2008) instead of hashed bands. N-grams are compared by 64-bit hashes. Time and memory follow the number of
    n-grams and the number of pairs that share rare ones; k copies of one text are k (k - 1) / 2 pairs.

    Args:
        texts: N texts, in the forms that :func:`fastsft.ops.near_duplicates` takes.
        threshold: in (0, 1]. Low thresholds leave little to filter by.
        ngram, unit: as for :func:`fastsft.ops.minhash_signatures`. Two texts without any n-gram have similarity 1.

    Returns:
        pairs int64 [P, 2], each (i, j) with i < j, ascending; and their similarities, float64 [P].

    Raises:
        ValueError: an element is not a string or holds a lone surrogate; broken offsets; a bad option.
    """
    op = "similar_pairs"
    chars = _texts.check_unit(op, unit)
    data, offsets, _ = _texts.native(op, texts)
    pairs, similarities = _C.similar_pairs(data, offsets, float(threshold), ngram, chars)
    return pairs, similarities


_registry.record(
    "similar_pairs",
    cpu=_registry.Implementation("native", "C++ kernel"),
    cuda=_registry.Implementation("none", "texts live on the host"),
)
