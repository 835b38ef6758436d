"""Fill in the middle (arXiv 2207.14255): documents rearranged so that a left-to-right model learns to infill.

How a family of models writes the pieces is in :mod:`fastsft.models.fim`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from fastsft.config import FimOptions, WeightOptions
from fastsft.data.chat import Draft, Piece, head
from fastsft.data.records import Record
from fastsft.data.segments import Part, Segment
from fastsft.models.fim import Fim
from fastsft.models.tokenizer import Tokenizer
from fastsft.ops.fim_rows import MIDDLE, PREFIX, SUFFIX, fim_cuts

MARKERS = 4  # tokens of a rearranged sample that are not the document's: three sentinels and the end of text
Spans = Literal["char", "token", "line", "syntax", "tree_sitter"]
_STREAM = 0x46494D << 32  # kFimIndex of fim.h
WEIGHTS = WeightOptions()
"""Of the segments of a sample laid out for infilling, whatever ``data.weights`` says of other samples."""


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
    text: str,
    *,
    seed: int,
    index: int,
    rate: float,
    spm_rate: float,
    spans: Spans = "char",
    tokenizer: Tokenizer | None = None,
    head: Callable[[str], str] | None = None,
) -> tuple[str, str, str, bool] | None:
    """Where document ``index`` is cut: (prefix, middle, suffix, spm), or None with probability 1 - rate.

    A pure function of its arguments. An empty document is never cut.

    Args:
        spans: the middle is what lies between two uniform places (any part may be empty): between characters ("char"),
            tokens ("token") or lines ("line"); or a statement, block or bracket of Python source ("syntax"), or a node
            of its syntax tree ("tree_sitter"), each as likely as the others, and as for "char" where there is none.
        tokenizer: for "token".
        head: what is kept of a document that is cut, before the places are drawn.

    Raises:
        ImportError: "tree_sitter", which is not installed.
    """
    from fastsft.ops.reference import philox  # which imports torch

    unit = {"line": "line", "syntax": "syntax"}.get(spans, "character")
    (mode,), (places,) = fim_cuts([text], seed=seed, rate=rate, spm_rate=spm_rate, unit=unit, doc_ids=[index])
    if mode == 0:
        return None
    if head is not None:
        text = head(text)
        _, (places,) = fim_cuts([text], seed=seed, rate=rate, spm_rate=spm_rate, unit=unit, doc_ids=[index])
    first, second = places.tolist()
    data = text.encode()
    draw = philox(seed, index, _STREAM)[2:]
    if spans == "token" and tokenizer is not None:
        starts = (begin for begin, _ in tokenizer.encode_rendered([text])[0][1])
        between = [*dict.fromkeys([0, *starts, len(text)])]  # once where several tokens share a character
        first, second = (len(text[: between[bits * len(between) >> 32]].encode()) for bits in sorted(draw))
    elif spans == "tree_sitter" and (nodes := _nodes(data)):
        first, second = nodes[draw[0] * len(nodes) >> 32]
    prefix, middle, suffix = (part.decode() for part in (data[:first], data[first:second], data[second:]))
    return prefix, middle, suffix, bool(mode == 2)


def _nodes(source: bytes) -> list[tuple[int, int]]:
    """The named nodes below the root of Python source, as bytes, in order; of equal ones the first."""
    from tree_sitter import Language, Parser
    from tree_sitter_python import language

    found: dict[tuple[int, int], None] = {}
    waiting = list(Parser(Language(language())).parse(source).root_node.named_children)
    while waiting:
        node = waiting.pop()
        if node.end_byte > node.start_byte:
            found[node.start_byte, node.end_byte] = None
        waiting += node.named_children
    return sorted(found)


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
    given, mark = (Segment.ANSWER, Segment.CONTROL) if train_context else (Segment.PROMPT, Segment.PROMPT)
    prefix, middle, suffix = parts
    pieces = {
        PREFIX: Piece(prefix, given, "start"),
        MIDDLE: Piece(middle, Segment.ANSWER, "inner" if prefix else "start"),
        SUFFIX: Piece(suffix, given),
    }
    start = head(tokenizer)
    layout = fim.layout(spm)
    body = [pieces[item] if item < 0 else Piece(item, mark) for item in layout]
    context = (len(start) + layout.index(PREFIX), len(start) + layout.index(SUFFIX))
    return Draft((*start, *body, Piece(fim.end_id, Segment.CONTROL)), WEIGHTS, weight, context, shortened)


def draft_record(record: Record, tokenizer: Tokenizer, fim: Fim) -> Draft:
    """An infilling row (prefix, suffix, middle), in PSM order where the format has it, trained on the middle."""
    prefix, suffix, middle = record.parts
    return draft_fim((prefix, middle, suffix), tokenizer, fim, spm=False, train_context=False, weight=record.weight)


def shorten(parts: list[Part], context: tuple[int, int], limit: int) -> list[Part] | None:
    """At most ``limit`` tokens: the prefix loses its start and the suffix its end, what is next to the middle stays.

    Each may have half of the room, and what the other leaves of its half. None if the rest alone is too long.
    """
    prefix, suffix = context
    before, after = len(parts[prefix].ids), len(parts[suffix].ids)
    room = limit - sum(len(part.ids) for part in parts) + before + after
    if room < 0:
        return None
    kept_after = min(after, max(room // 2, room - before))
    kept_before = min(before, room - kept_after)
    fitting = list(parts)
    for number, kept in ((prefix, slice(before - kept_before, None)), (suffix, slice(kept_after))):
        fitting[number] = parts[number].take(kept)
    return fitting
