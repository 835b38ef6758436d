"""N-grams that texts share with references: evaluation instances inside training texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastsft import _C
from fastsft.ops import _registry, _texts
from fastsft.ops._texts import Texts

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Overlaps:
    """M pairs of a text and a reference, by ascending text, then reference.

    Column k of K stands for the k-th of the index's n.

    Attributes:
        text, reference: int64 [M].
        ngrams: int64 [M, K]: positions of the reference whose n-gram occurs in the text.
        words: int64 [M, K]: words of the reference that lie in such n-grams.
        passage: int64 [M, K, 2]: from which to which byte of the reference's UTF-8 its longest passage goes, the first
            of several, all of whose n-grams occur in the text; (0, 0) where there is none.
        found: bool [R]: the references of which some text shares as much as was asked for.
    """

    text: Ints
    reference: Ints
    ngrams: Ints
    words: Ints
    passage: Ints
    found: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.text)


def ngram_index(references: Texts, ngrams: Sequence[int] = (8, 10, 13)) -> _C.NgramIndex:
    """Every n-gram of words of the references, for :func:`ngram_overlap`. It does not keep the references.

    Words are those of :func:`~fastsft.ops.minhash_signatures`: runs of letters, digits and underscores. A reference of
    fewer than n words has no n-gram.

    Args:
        references: R strings; or their UTF-8 as (data uint8 [bytes], offsets int64 [R + 1]).
        ngrams: the values of n, in any order; larger ones cost next to nothing beside the smallest.

    Returns:
        The index: ``len(index)`` is R, ``index.ngrams`` the values of n, ascending, and ``index.num_words`` int64 [R].

    Raises:
        ValueError: no n, one below 1 or the same twice; an element is not a string or holds a lone surrogate; broken
            offsets.
    """
    data, offsets, _ = _texts.native("ngram_index", references)
    return _C.NgramIndex(data, offsets, sorted(ngrams))


def ngram_overlap(texts: Texts, index: _C.NgramIndex, *, above: Sequence[float] | None = None) -> Overlaps:
    """The n-grams of words that texts share with the references of an index, for each n, and what they cover.

    Exact: hashes only find candidates, whose words are then compared. Runs natively, on all threads, without holding
    the GIL; the result does not depend on their number or the machine.

    Args:
        texts: N strings; or their UTF-8 as (data uint8 [bytes], offsets int64 [N + 1]), read in place.
        index: what :func:`ngram_index` made of the references.
        above: None: all pairs that share an n-gram of the smallest n. K shares in [0, 1), one for each of
            ``index.ngrams``: of each text only the pair with the largest share, the first of several, among those where
            for some n more than that share of the reference's words is covered. Where many texts and references have
            one header in common, their pairs would not fit in memory.

    Raises:
        ValueError: an element is not a string or holds a lone surrogate; broken offsets; ``above`` of another length.
    """
    data, offsets, _ = _texts.native("ngram_overlap", texts)
    pairs, shared, found = _C.ngram_overlap(data, offsets, index, None if above is None else list(above))
    return Overlaps(
        pairs[:, 0], pairs[:, 1], shared[:, :, 0], shared[:, :, 1], shared[:, :, 2:], found.astype(np.bool_)
    )


for _name in ("ngram_index", "ngram_overlap"):
    _registry.record(
        _name,
        cpu=_registry.Implementation("native", "C++ kernel"),
        cuda=_registry.Implementation("none", "texts live on the host"),
    )
