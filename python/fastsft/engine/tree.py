"""Several guesses at what follows one text, checked in one step: a tree, as the paths from its root to its leaves.

Each path is computed as a sequence of its own: the text's last token, then the path's. They share the blocks of the
cache that lie before that token; the one that it is in is copied for each further path. So a path's rows are computed
as if it were the only guess, by the same kernels and to the same bits, and what is kept of it in the end is where plain
decoding would have put it. A tree whose rows shared what their paths have in common would save computing these tokens
again; it needs attention that skips, for each row, keys of other branches, in another order of sums.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fork:
    """A further path. The first ``shared`` of its blocks are the sequence's; those from the text's last token on are
    its own."""

    draft: list[int]
    blocks: array[int]
    shared: int


def rows_of(paths: Sequence[Sequence[int]]) -> int:
    """Tokens to compute: each path's, and the last one of the text before each."""
    return len(paths) + sum(map(len, paths))


def guesses_of(paths: Sequence[Sequence[int]]) -> int:
    """Nodes of the tree: a token that several paths share counts once."""
    if len(paths) == 1:
        return len(paths[0])
    return len({tuple(path[:end]) for path in paths for end in range(1, 1 + len(path))})
