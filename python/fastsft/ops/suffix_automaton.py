"""What followed the last time that a text's end occurred: the suffix automaton of a growing text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fastsft import _C

SEPARATOR = -1


class SuffixAutomaton:
    """Every substring of a text, found in time that does not depend on the text's length.

    Appending costs amortised O(1) for each token and, at the worst, 220 bytes, about 130 for code; ``bytes`` says how
    many are held. A negative token separates texts: no guess goes past it.
    """

    def __init__(self, tokens: Sequence[int] | npt.NDArray[np.int32] = ()) -> None:
        self._native = _C.SuffixAutomaton()
        self.extend(tokens)

    def extend(self, tokens: Sequence[int] | npt.NDArray[np.int32]) -> None:
        """Append tokens.

        Raises:
            ValueError: more than 2^30 of them in all.
        """
        self._native.extend(np.ascontiguousarray(tokens, dtype=np.int32))

    def __len__(self) -> int:
        return self._native.size

    @property
    def states(self) -> int:
        return self._native.states

    @property
    def bytes(self) -> int:
        return self._native.bytes

    @property
    def repeated(self) -> int:
        """Length of the longest end of the text that also occurs earlier in it."""
        return self._native.repeated

    def propose(self, limit: int) -> list[int]:
        """What followed there, at most ``limit`` tokens; a place that overlaps the end goes on periodically."""
        out = np.empty(limit, dtype=np.int32)
        found: list[int] = out[: self._native.propose(out)].tolist()
        return found

    def cursor(self) -> Cursor:
        """For a text that grows elsewhere."""
        return Cursor(self._native)


class Cursor:
    """Where another text stands in an automaton: ``matched`` is the length of its longest end that occurs there."""

    def __init__(self, native: _C.SuffixAutomaton) -> None:
        self._native = native
        self._state = self.matched = 0

    def follow(self, tokens: Sequence[int]) -> None:
        given = np.ascontiguousarray(tokens, dtype=np.int32)
        self._state, self.matched = self._native.follow(self._state, self.matched, given)

    def propose(self, limit: int) -> list[int]:
        """What follows there, at most ``limit`` tokens."""
        out = np.empty(limit, dtype=np.int32)
        found: list[int] = out[: self._native.propose_at(self._state, self.matched, out)].tolist()
        return found
