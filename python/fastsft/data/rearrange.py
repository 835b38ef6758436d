"""Texts to infilling samples natively: encoded whole, cut and rearranged by :func:`fastsft.ops.fim_rows`.

The ids are those of :func:`fastsft.data.fim.draft_fim`, which lays out pieces that are encoded one by one: the way of
the vocabularies, and of the rows, that the native encoder refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastsft import ops
from fastsft.config import Config
from fastsft.data import fim
from fastsft.data.chat import end_id
from fastsft.data.records import Record
from fastsft.data.segments import Part, Segment, weigh
from fastsft.models.fim import Fim
from fastsft.models.tokenizer import Tokenizer
from fastsft.ops.bpe import ByteBpe, PackedIds
from fastsft.ops.fim_rows import PREFIX, SUFFIX, FimRows, fim_cuts

_UNITS = {"char": "character", "line": "line", "syntax": "syntax"}


@dataclass(frozen=True)
class Rearranged:
    """The pieces of a sample, encoded; ``context`` and ``shortened`` as in :class:`fastsft.data.chat.Draft`, the former
    None for a text left as it is."""

    parts: list[Part]
    context: tuple[int, int] | None
    shortened: bool


def rearrange(
    records: Sequence[Record], numbers: Sequence[int], tokenizer: Tokenizer, marks: Fim, config: Config
) -> list[Rearranged | None]:
    """Each text as ``data.fim`` asks; None where its pieces must be encoded one by one.

    Args:
        records: of kind text.
        numbers: their numbers, on which the draws depend.
    """
    encoder = tokenizer.byte_bpe
    texts = [record.parts[0] for record in records]
    whole, packed = _fitting(texts, numbers, tokenizer, encoder, config)
    usable = np.array(
        [exact and encoder.normal(t) == t for exact, t in zip(packed.exact.tolist(), texts, strict=True)], np.bool_
    )
    rows = _rows(texts, usable, np.asarray(numbers, np.int64), packed, tokenizer, marks, config)
    starts, modes, bounds = rows.cu_seqlens.tolist(), rows.mode.tolist(), rows.bounds.tolist()
    found: list[Rearranged | None] = []
    for i, (record, mode) in enumerate(zip(records, modes, strict=True)):
        if not usable[i] or mode == -1 or (not texts[i] and whole[i]):
            found.append(None)
            continue
        head = weigh(tokenizer.prefix_ids, Segment.PROMPT, config.data.weights, 0.0)
        row = rows.tokens[starts[i] : starts[i + 1]]
        if mode == 0:
            body = weigh(row, Segment.ANSWER, config.data.weights, record.weight)
            end = weigh([end_id(tokenizer)], Segment.CONTROL, config.data.weights, record.weight)
            found.append(Rearranged([head, body, end], None, False))
            continue
        layout = marks.layout(mode == 2)
        parts, at = [head], 0
        for item in (*layout, marks.end_id):
            begin, stop = bounds[i][2 * (-1 - item) : 2 * (-item)] if item < 0 else (at, at + 1)
            kind = Segment.ANSWER if item < 0 else Segment.CONTROL
            parts.append(weigh(row[begin:stop], kind, fim.WEIGHTS, record.weight))
            at = stop
        context = (1 + layout.index(PREFIX), 1 + layout.index(SUFFIX))
        found.append(Rearranged(parts, context, len(texts[i]) < len(whole[i])))
    return found


def _fitting(
    texts: list[str], numbers: Sequence[int], tokenizer: Tokenizer, encoder: ByteBpe, config: Config
) -> tuple[list[str], PackedIds]:
    """The texts as they were, and the ids of those in ``texts``, where one that is cut and too long is now its head."""
    whole, options = list(texts), config.data.fim
    packed = encoder.encode(texts)
    room = config.data.max_length - len(tokenizer.prefix_ids) - fim.MARKERS
    sizes = np.diff(packed.cu_seqlens).tolist() if config.data.on_long == "truncate" else []
    long = [i for i, size in enumerate(sizes) if size > room]
    modes, _ = fim_cuts(
        [texts[i] for i in long], seed=config.seed, rate=options.rate, doc_ids=[numbers[i] for i in long]
    )
    for i, mode in zip(long, modes, strict=True):
        if mode:
            texts[i] = tokenizer.head(texts[i], room)
    return whole, encoder.encode(texts) if modes.any() else packed


def _rows(
    texts: list[str],
    usable: npt.NDArray[np.bool_],
    numbers: npt.NDArray[np.int64],
    packed: PackedIds,
    tokenizer: Tokenizer,
    marks: Fim,
    config: Config,
) -> FimRows:
    options = config.data.fim
    spans = None
    if options.spans not in _UNITS:
        spans = np.zeros((len(texts), 2), np.int64)
        for i in np.flatnonzero(usable):
            places = fim.cut(
                texts[i], seed=config.seed, index=int(numbers[i]), rate=options.rate, spm_rate=options.spm_rate,
                spans=options.spans, tokenizer=tokenizer,
            )  # fmt: skip
            if places is not None:
                prefix, middle, _, _ = places
                spans[i] = np.cumsum([len(prefix.encode()), len(middle.encode())])
    return ops.fim_rows(
        packed.ids, packed.cu_seqlens, psm=(*marks.layout(False), marks.end_id),
        spm=(*marks.layout(True), marks.end_id), seed=config.seed, rate=options.rate, spm_rate=options.spm_rate,
        unit=_UNITS.get(options.spans, "character"), encoder=tokenizer.byte_bpe, spans=spans, doc_ids=numbers,
    )  # fmt: skip
