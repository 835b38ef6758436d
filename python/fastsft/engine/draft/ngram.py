"""Prompt look-up: what followed the last time that the text's last n tokens occurred (Saxena 2023)."""

from __future__ import annotations

from collections.abc import Sequence

from fastsft.engine.draft.guess import Guess


class NgramGuess(Guess):
    """Of one text that grows.

    Each n-gram's latest place is kept as the text grows: O(longest - shortest + 1) for each token, in time and memory.

    Args:
        longest, shortest: the n to look for, the longest first.
    """

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self._lengths = range(longest, shortest - 1, -1)
        self._places: dict[tuple[int, ...], int] = {}  # an n-gram -> index of the token after it
        self._known = 0

    def propose(self, tokens: Sequence[int], limit: int) -> list[int]:
        """At most ``limit`` tokens; none where nothing like the end occurred before."""
        for end in range(self._known + 1, len(tokens)):
            for n in self._lengths:
                if n <= end:
                    self._places[tuple(tokens[end - n : end])] = end
        self._known = max(self._known, len(tokens) - 1)
        for n in self._lengths:
            place = self._places.get(tuple(tokens[-n:])) if n <= len(tokens) else None
            if place is not None:
                return list(tokens[place : place + limit])
        return []
