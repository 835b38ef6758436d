"""Fill in the middle (arXiv 2207.14255): documents rearranged so that a left-to-right model learns to infill.

PSM order is ``PRE prefix SUF suffix MID middle EOS``; SPM (the second variant, where the middle continues the prefix)
is ``PRE SUF suffix MID prefix middle EOS``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastsft.data.chat import Draft, end_id
from fastsft.data.records import Record
from fastsft.models.tokenizer import Tokenizer


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
            ValueError: one of them is not a token of this vocabulary.
        """
        ids = []
        for name, token in (("prefix", prefix), ("suffix", suffix), ("middle", middle)):
            found = tokenizer.token_id(token)
            if found is None:
                raise ValueError(f"data.fim.{name}: {token!r} is not a token of this vocabulary")
            ids.append(found)
        return cls(*ids)


def cut(text: str, *, seed: int, index: int, rate: float, spm_rate: float) -> tuple[str, str, str, bool] | None:
    """Where document ``index`` is cut: (prefix, middle, suffix, spm), or None with probability 1 - rate.

    Both cuts are uniform over the len + 1 places between characters, so an empty part is possible. A pure function of
    its arguments.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, index]))
    chosen, order = rng.random(2)
    first, second = sorted(rng.integers(0, len(text) + 1, size=2).tolist())
    if chosen >= rate:
        return None
    return text[:first], text[first:second], text[second:], bool(order < spm_rate)


def draft_fim(
    parts: tuple[str, str, str],
    tokenizer: Tokenizer,
    sentinels: Sentinels,
    *,
    spm: bool,
    train_context: bool,
    weight: float = 1.0,
) -> Draft:
    """Lay out (prefix, middle, suffix). ``train_context``: all tokens are trained, as in pre-training; otherwise only
    the middle and the end of text, as when tuning on infilling rows."""
    prefix, middle, suffix = parts
    c = 1.0 if train_context else 0.0
    head: list[tuple[str | int, float]] = [(t, 0.0) for t in tokenizer.prefix_ids]
    if spm:
        head += [(sentinels.prefix, c), (sentinels.suffix, c), (suffix, c), (sentinels.middle, c), (prefix, c)]
    else:
        head += [(sentinels.prefix, c), (prefix, c), (sentinels.suffix, c), (suffix, c), (sentinels.middle, c)]
    return Draft((*head, (middle, 1.0), (end_id(tokenizer), 1.0)), None, weight)


def draft_record(record: Record, tokenizer: Tokenizer, sentinels: Sentinels) -> Draft:
    """An infilling row (prefix, suffix, middle) in PSM order, trained on the middle."""
    prefix, suffix, middle = record.parts
    return draft_fim(
        (prefix, middle, suffix), tokenizer, sentinels, spm=False, train_context=False, weight=record.weight
    )


def restore(text: str, prefix: str, suffix: str, middle: str, end: str) -> str:
    """Undo the rearrangement of a decoded sample (special tokens kept): the original document."""
    body = text.removesuffix(end)
    head, _, rest = body.partition(prefix)
    before, _, rest = rest.partition(suffix)
    if before:  # PSM with a non-empty prefix
        after, _, mid = rest.partition(middle)
        return head + before + mid + after
    after, _, mid = rest.partition(middle)
    return head + mid + after
