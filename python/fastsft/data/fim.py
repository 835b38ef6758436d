"""Fill in the middle (arXiv 2207.14255): documents rearranged so that a left-to-right model learns to infill.

How a family of models writes the pieces is in :mod:`fastsft.models.fim`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastsft.config import FimOptions
from fastsft.data.chat import Draft, Piece
from fastsft.data.records import Record
from fastsft.models.fim import MIDDLE, PREFIX, SUFFIX, Fim
from fastsft.models.tokenizer import Tokenizer

MARKERS = 4  # tokens of a rearranged sample that are not the document's: three sentinels and the end of text
Part = tuple[list[int], list[float]]  # a piece's ids and weights


def find_format(tokenizer: Tokenizer, options: FimOptions) -> Fim:
    """The format that ``data.fim`` asks for.

    Raises:
        ValueError: none or several fit the vocabulary; the message names the setting.
    """
    try:
        return Fim.find(tokenizer, options.format, options.markers)
    except ValueError as error:
        raise ValueError(f"data.fim.{error}") from None


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
    fim: Fim,
    *,
    spm: bool,
    train_context: bool,
    weight: float = 1.0,
    shortened: bool = False,
) -> Draft:
    """Lay out (prefix, middle, suffix). ``train_context``: all tokens are trained, as in pre-training; otherwise only
    the middle and its end, as when tuning on infilling rows."""
    c = 1.0 if train_context else 0.0
    prefix, middle, suffix = parts
    pieces = {
        PREFIX: Piece(prefix, c, "start"),
        MIDDLE: Piece(middle, 1.0, "inner" if prefix else "start"),
        SUFFIX: Piece(suffix, c),
    }
    head = [Piece(t, 0.0) for t in tokenizer.prefix_ids]
    layout = fim.layout(spm)
    body = [pieces[item] if item < 0 else Piece(item, c) for item in layout]
    context = (len(head) + layout.index(PREFIX), len(head) + layout.index(SUFFIX))
    return Draft((*head, *body, Piece(fim.end_id, 1.0)), weight, context, shortened)


def draft_record(record: Record, tokenizer: Tokenizer, fim: Fim) -> Draft:
    """An infilling row (prefix, suffix, middle), in PSM order where the format has it, trained on the middle."""
    prefix, suffix, middle = record.parts
    return draft_fim((prefix, middle, suffix), tokenizer, fim, spm=False, train_context=False, weight=record.weight)


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
