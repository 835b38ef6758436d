"""Packing."""

from __future__ import annotations

from collections.abc import Sequence


def pack_sequences(lengths: Sequence[int], *, capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the members of each bin, in the order in which they were placed."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [(room[b], b) for b in range(len(bins)) if room[b] >= lengths[i]]
        if not fitting:
            bins.append([])
            room.append(capacity)
        b = min(fitting)[1] if fitting else len(bins) - 1
        bins[b].append(i)
        room[b] -= lengths[i]
    return bins
