"""What a step computes, and who guesses ahead of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from fastsft.engine.sequence import Sequence


class Drafter(Protocol):
    """Guesses what follows. A guess costs a row of a step; it holds where the draw equals it, and changes no result.

    One that sets ``Sequence.draft_probs_KV``, what its guesses were drawn from, has them judged by rejection sampling:
    then it changes what is drawn, but not the distribution.
    """

    def begin(self, sequences: int) -> bool:
        """A step begins, in which so many sequences generate: whether to ask for drafts in it."""

    def propose(self, sequence: Sequence, limit: int) -> list[list[int]]:
        """Paths of at most ``limit`` tokens, each of which may follow ``sequence.tokens``: branches of a tree."""

    def observe(self, sequence: Sequence, paths: list[list[int]], best: int, accepted: int) -> None:
        """Which of the paths that a step computed held the longest, and how many tokens of it; called when ``sequence``
        has advanced."""

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended or was given up."""

    def measured(self, rows: int, seconds: float) -> None:
        """A step that drew tokens is over: the rows that it computed, and how long all of it took."""


@dataclass(frozen=True)
class Work:
    """``count`` tokens of a sequence, its drafts and those of its forks last; logits are wanted after the last ``rows``
    of them, and after all where they score the prompt."""

    sequence: Sequence
    count: int
    rows: int
    scores: bool = False


@dataclass
class Step:
    """``copies``: blocks (source, target) to copy, in order, before anything is computed."""

    copies: list[tuple[int, int]] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    apart: list[Work] = field(default_factory=list)
    """For another process to begin with; no logits are wanted of it."""
