"""What a method of speculative decoding provides."""

from __future__ import annotations

from abc import ABC, abstractmethod


class Guess(ABC):
    """What may follow one text."""

    @abstractmethod
    def propose(self, tokens: list[int], limit: int) -> list[int]:
        """At most ``limit`` tokens; ``tokens`` begins with those of the call before."""

    def others(self, count: int) -> list[int]:
        """The next best guess in each of the first ``count`` places of the latest proposal, after those before it.

        Asked for at most once after each proposal, which may then be forgotten.
        """
        return []

    def close(self) -> None:
        """The text has ended."""
        return
