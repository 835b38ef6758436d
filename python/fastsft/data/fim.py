"""Fill in the middle (arXiv 2207.14255): documents rearranged so that a left-to-right model learns to infill.

PSM order is ``PRE prefix SUF suffix MID middle EOS``; SPM (the second variant, where the middle continues the prefix)
is ``PRE SUF suffix MID prefix middle EOS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fastsft.data.chat import Draft, Piece, end_id
from fastsft.data.records import Record
from fastsft.models.tokenizer import Tokenizer

MARKERS = 4  # tokens of a rearranged sample that are not the document's: three sentinels and the end of text
Part = tuple[list[int], list[float]]  # a piece's ids and weights


@dataclass(frozen=True)
class Sentinels:
    """Token ids of the three markers."""

    prefix: int
    suffix: int
    middle: int

    @classmethod
    def find(cls, tokenizer: Tokenizer, prefix: str, suffix: str, middle: str) -> Sentinels:
        """Look the markers up.

        Raises:
            ValueError: one of them is not a token of this vocabulary, or one that the text of a file could hold.
        """
        ids = []
        for name, token in (("prefix", prefix), ("suffix", suffix), ("middle", middle)):
            found = tokenizer.token_id(token)
            if found is None:
                raise ValueError(f"data.fim.{name}: {token!r} is not a token of this vocabulary")
            if token not in tokenizer.control.names:
                raise ValueError(f"data.fim.{name}: {token!r} must be a special token in tokenizer.json")
            ids.append(found)
        return cls(*ids)


def cut(
    text: str, *, seed: int, index: int, rate: float, spm_rate: float, head: Callable[[str], str] | None = None
) -> tuple[str, str, str, bool] | None:
    """Where document ``index`` is cut: (prefix, middle, suffix, spm), or None with probability 1 - rate.

    Both cuts are uniform over the len + 1 places between characters, so an empty part is possible. A pure function of
    its arguments.

    Args:
        head: what is kept of a document that is cut, before the places are drawn.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, index]))
    chosen, order = rng.random(2)
    if chosen >= rate:
        return None
    if head is not None:
        text = head(text)
    first, second = sorted(rng.integers(0, len(text) + 1, size=2).tolist())
    return text[:first], text[first:second], text[second:], bool(order < spm_rate)


def draft_fim(
    parts: tuple[str, str, str],
    tokenizer: Tokenizer,
    sentinels: Sentinels,
    *,
    spm: bool,
    train_context: bool,
    weight: float = 1.0,
    shortened: bool = False,
) -> Draft:
    """Lay out (prefix, middle, suffix). ``train_context``: all tokens are trained, as in pre-training; otherwise only
    the middle and the end of text, as when tuning on infilling rows."""
    c = 1.0 if train_context else 0.0
    head = [Piece(t, 0.0) for t in tokenizer.prefix_ids]
    prefix, suffix = Piece(parts[0], c, "start"), Piece(parts[2], c)
    pre, suf, mid = (Piece(t, c) for t in (sentinels.prefix, sentinels.suffix, sentinels.middle))
    context = [pre, suf, suffix, mid, prefix] if spm else [pre, prefix, suf, suffix, mid]
    at = len(head)
    return Draft(
        (*head, *context, Piece(parts[1], 1.0), Piece(end_id(tokenizer), 1.0)),
        weight,
        (at + 4, at + 2) if spm else (at + 1, at + 3),
        shortened,
    )


def draft_record(record: Record, tokenizer: Tokenizer, sentinels: Sentinels) -> Draft:
    """An infilling row (prefix, suffix, middle) in PSM order, trained on the middle."""
    prefix, suffix, middle = record.parts
    return draft_fim(
        (prefix, middle, suffix), tokenizer, sentinels, spm=False, train_context=False, weight=record.weight
    )


def shorten(parts: list[Part], context: tuple[int, int], limit: int) -> list[Part] | None:
    """At most ``limit`` tokens: the prefix loses its start and the suffix its end, what is next to the middle stays.

    Each may have half of the room, and what the other leaves of its half. None if the rest alone is too long.
    """
    prefix, suffix = context
    before, after = len(parts[prefix][0]), len(parts[suffix][0])
    room = limit - sum(len(ids) for ids, _ in parts) + before + after
    if room < 0:
        return None
    kept_after = min(after, max(room // 2, room - before))
    kept_before = min(before, room - kept_after)
    fitting = list(parts)
    for number, kept in ((prefix, slice(before - kept_before, None)), (suffix, slice(kept_after))):
        ids, weights = parts[number]
        fitting[number] = (ids[kept], weights[kept])
    return fitting
