"""All pairs of similar sets by a product of sparse matrices: the usual way to miss none, and the benches' truth."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from collections.abc import Set as AbstractSet

import numpy as np
import numpy.typing as npt
from scipy import sparse


def sparse_join(
    sets: Sequence[AbstractSet[Hashable]], threshold: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Pairs (i, j), i < j, ascending, of Jaccard similarity >= threshold, and their similarities. Empty sets have no
    pair."""
    numbers: dict[Hashable, int] = {}
    columns = [numbers.setdefault(x, len(numbers)) for members in sets for x in members]
    ends = np.array([0, *itertools.accumulate(map(len, sets))])
    matrix = sparse.csr_matrix((np.ones(len(columns), np.int32), columns, ends), (len(sets), len(numbers)))
    common = sparse.triu(matrix @ matrix.T, k=1, format="coo")
    sizes = np.diff(ends)
    similarity = common.data / (sizes[common.row] + sizes[common.col] - common.data)
    kept = similarity >= threshold
    pairs = np.stack([common.row[kept], common.col[kept]], 1).astype(np.int64)
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    return pairs[order], similarity[kept][order]
