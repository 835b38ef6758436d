"""How the [rows, vocabulary] logits of the loss are cut into tiles, of which one exists at a time."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from fastsft.ops.objectives import Sequences

# Of logits. The fewer tiles, the fewer times the whole gradient of the weight is read and written; with a single one
# it needs no float32 buffer.
FAST_BYTES = 256 << 20
# Lean: the tile, and a block of the weight's gradient in float32 where the rows do not fit one tile.
LEAN_BYTES, LEAN_BLOCK_BYTES = 48 << 20, 16 << 20
_LEAN_COLUMNS = 1024  # with fewer, products are slow

Ranges = list[tuple[int, int]]  # begin, end


class Plan(NamedTuple):
    """``rows`` from the last to the first. ``twice``: all rows are reduced before any is differentiated."""

    rows: Ranges
    columns: Ranges
    twice: bool

    @property
    def tile(self) -> int:
        """Elements of the largest tile."""
        rows = max((end - begin for begin, end in self.rows), default=0)
        return rows * padded(max(end - begin for begin, end in self.columns))


def fast(count: int, vocab: int, row_bytes: int, sequences: Sequences | None, *, wait: bool) -> Plan:
    """Tiles of whole rows. ``sequences``: those within which a token's weight depends on all others; unless the host
    may not ``wait`` to learn where they begin, tiles end where they do, so that each is known when it is needed."""
    limit = max(1, FAST_BYTES // row_bytes)
    rows = _rows(count, limit)
    if sequences is None or len(rows) < 2:
        return Plan(rows, [(0, vocab)], twice=False)
    whole = _rows_of_sequences(torch.unique(sequences.start).tolist(), count, limit) if wait else None
    return Plan(rows if whole is None else whole, [(0, vocab)], twice=whole is None)


def lean(count: int, vocab: int, element_bytes: int, width: int) -> Plan:
    """Blocks of the vocabulary, as wide as lets all rows into one tile. ``width``: of the hidden states."""
    least = max(1, min(_LEAN_COLUMNS, LEAN_BLOCK_BYTES // (4 * width)))
    columns = min(vocab, max(least, LEAN_BYTES // (element_bytes * max(count, 1)) // 64 * 64))
    limit = max(1, LEAN_BYTES // (element_bytes * padded(columns)))
    blocks = [(begin, min(begin + columns, vocab)) for begin in range(0, vocab, columns)]
    return Plan(_rows(count, limit), blocks, twice=len(blocks) > 1)


def padded(columns: int) -> int:
    """The next multiple of 8, so that rows start at 16 bytes."""
    return -(-columns // 8) * 8


def _rows(count: int, limit: int) -> Ranges:
    """Tiles of at most ``limit`` rows, as equal as can be."""
    tiles = -(-count // limit)
    bounds = [count * i // tiles for i in range(tiles + 1)] if tiles else [0]
    return list(itertools.pairwise(bounds))[::-1]


def _rows_of_sequences(starts: list[int], count: int, limit: int) -> Ranges | None:
    """Tiles of whole sequences; None if a sequence is longer than a tile."""
    ranges: Ranges = []
    begin = end = count
    for start in reversed(starts):
        if end - start > limit and begin < end:
            ranges.append((begin, end))
            end = begin
        if end - start > limit:
            return None
        begin = start
    return [*ranges, (begin, end)] if begin < end else ranges
