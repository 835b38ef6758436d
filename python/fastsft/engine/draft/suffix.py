"""What followed the longest end of the text that occurred before, in the text itself or in a corpus."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastsft.engine.draft.guess import Guess
from fastsft.ops.suffix_automaton import SEPARATOR, SuffixAutomaton


def corpus_automaton(texts: Iterable[Sequence[int]]) -> SuffixAutomaton:
    """Of several texts; no guess goes from one into the next."""
    automaton = SuffixAutomaton()
    for text in texts:
        automaton.extend(text)
        automaton.extend([SEPARATOR])
    return automaton


class SuffixGuess(Guess):
    """Of one text that grows. On equal matches the text itself goes before the corpus.

    Args:
        corpus: shared by all texts; it is only read.
        shortest: fewer matching tokens are no reason for a guess.
    """

    def __init__(self, corpus: SuffixAutomaton | None = None, shortest: int = 2) -> None:
        self._own, self._shortest = SuffixAutomaton(), shortest
        self._cursor = corpus.cursor() if corpus is not None else None

    def propose(self, tokens: Sequence[int], limit: int) -> list[int]:
        """At most ``limit`` tokens; none where nothing like the end is known."""
        new = tokens[len(self._own) :]
        self._own.extend(new)
        if self._cursor is not None:
            self._cursor.follow(new)
            if self._cursor.matched > max(self._own.repeated, self._shortest - 1):
                return self._cursor.propose(limit)
        return self._own.propose(limit) if self._own.repeated >= self._shortest else []
