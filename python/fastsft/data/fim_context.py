"""Fill-in-the-middle on packed rows and on whole repositories.

Rearranged before packing, a document may be cut away from its markers; the paper (arXiv 2207.14255) therefore splits
packed rows at the documents' ends and rearranges what is in them. Rows then grow by their markers. Here they are packed
anew, and nothing is cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastsft import ops
from fastsft.data.chat import Draft, Piece
from fastsft.data.fim import WEIGHTS, draft_fim
from fastsft.data.segments import Segment
from fastsft.models.fim import Fim
from fastsft.models.tokenizer import Tokenizer
from fastsft.ops.bpe import ByteBpe
from fastsft.ops.fim_rows import PREFIX, FimRows

# What a piece of text may grow by where it is cut: a token across a cut becomes several.
_SEAMS = 24
_FRAGMENTS = 20  # bits of a fragment's number within its row


@dataclass(frozen=True)
class Refilled:
    """Fragments of packed rows, rearranged, and the new rows that hold them.

    Row i has the fragments ``order[offsets[i] : offsets[i + 1]]``; those that their row's end cut off come last in
    ``fragments``. ``not_exact`` of them were left as they are because only the tokenizer itself can cut their text.
    """

    fragments: FimRows
    order: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    not_exact: int


def refill(
    tokens: npt.NDArray[Any],
    cu_seqlens: npt.NDArray[Any],
    fim: Fim,
    *,
    end_id: int,
    capacity: int,
    seed: int,
    rate: float = 0.5,
    spm_rate: float = 0.5,
    unit: str = "character",
    encoder: ByteBpe | None = None,
    row_ids: npt.NDArray[np.int64] | None = None,
) -> Refilled:
    """Rearrange the documents within packed rows and pack them anew.

    A row is split behind every ``end_id``, and a fragment that would not fit a row with its markers once more. Each
    fragment is rearranged with probability ``rate``; what follows a middle is the format's end token. A fragment that
    stays as it is keeps ``end_id`` if it had one. Draws depend on the seed and the row's id.

    Args:
        tokens: [T] int32 or int64, rows one after the other.
        cu_seqlens: [R + 1], row r is ``tokens[cu_seqlens[r] : cu_seqlens[r + 1]]``.
        end_id: the token behind each document.
        capacity: tokens of a new row.
        unit, encoder: as in :func:`fastsft.ops.fim_rows`.
        row_ids: [R] in [0, 2^43), the rows' identities for the random numbers; 0..R-1 by default.

    Raises:
        ValueError: a capacity that leaves no room beside the markers, broken ``cu_seqlens``, ``row_ids`` of another
            number or out of range, a row of more than 2^20 fragments, or what :func:`fastsft.ops.fim_rows` refuses.
    """
    room = capacity - len(fim.layout(False)) - 1 - _SEAMS
    if room < 1:
        raise ValueError(f"refill: capacity: expected more than {capacity - room}, got {capacity}")
    cu = np.asarray(cu_seqlens, np.int64)
    if cu.ndim != 1 or not len(cu) or cu[0] != 0 or cu[-1] != len(tokens) or (np.diff(cu) < 0).any():
        raise ValueError(f"refill: cu_seqlens: expected to ascend from 0 to the {len(tokens)} tokens, got {cu}")
    names = np.arange(len(cu) - 1) if row_ids is None else np.asarray(row_ids, np.int64)
    if names.shape != (len(cu) - 1,) or (names < 0).any() or (names >> (63 - _FRAGMENTS)).any():
        raise ValueError(f"refill: row_ids: expected {len(cu) - 1} numbers in [0, 2^{63 - _FRAGMENTS}), got {names}")
    at_end = np.asarray(tokens) == end_id
    starts, ended = _fragments(at_end, cu, room)
    row = np.searchsorted(cu, starts[:-1], side="right") - 1
    number = np.arange(len(row)) - np.searchsorted(row, row)
    if len(number) and number.max() >= 1 << _FRAGMENTS:
        raise ValueError(f"refill: expected rows of at most {1 << _FRAGMENTS} fragments, got {number.max() + 1}")
    ids = (names[row] << _FRAGMENTS) + number
    sizes = np.diff(starts)
    groups = []
    for whole in (True, False):  # documents that end here, and those that go on in another fragment
        chosen = ended == whole
        kept = np.repeat(chosen, sizes) & ~at_end
        lengths = (sizes - ended)[chosen]
        groups.append(
            ops.fim_rows(
                tokens[kept], np.concatenate([[0], np.cumsum(lengths)]), psm=(*fim.layout(False), fim.end_id),
                spm=(*fim.layout(True), fim.end_id), plain=(PREFIX, end_id) if whole else (PREFIX,), seed=seed,
                rate=rate, spm_rate=spm_rate, unit=unit, encoder=encoder, max_len=capacity, doc_ids=ids[chosen],
            )
        )  # fmt: skip
    first, second = groups
    shifted = second._replace(cu_seqlens=second.cu_seqlens[1:] + first.cu_seqlens[-1])
    fragments = FimRows(*(None if a is None else np.concatenate([a, b]) for a, b in zip(first, shifted, strict=True)))
    packs = ops.pack_sequences(np.diff(fragments.cu_seqlens), capacity=capacity)
    return Refilled(fragments, packs.order, packs.offsets, int((fragments.mode == -1).sum()))


def _fragments(at_end: npt.NDArray[np.bool_], cu: npt.NDArray[np.int64], room: int) -> tuple[Any, Any]:
    """Where each fragment begins, with the end behind the last, and whether it ends a document."""
    ends = np.flatnonzero(at_end) + 1
    starts = np.unique(np.concatenate([cu, ends]))
    sizes = np.diff(starts)
    pieces = np.maximum(1, -(-sizes // (room + 1)))  # an end token is no part of the text
    first = np.repeat(starts[:-1], pieces)
    number = np.arange(len(first)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.append(first + number * (room + 1), starts[-1])
    return starts, at_end[starts[1:] - 1] if len(first) else np.zeros(0, bool)


def draft_repository(
    name: str,
    files: Sequence[tuple[str, str]],
    parts: tuple[str, str, str],
    tokenizer: Tokenizer,
    fim: Fim,
    *,
    spm: bool = False,
    weight: float = 1.0,
) -> Draft:
    """A repository as one sample: its files as they are, and the last one's text rearranged.

    ``REPO name FILE path text FILE path`` and then prefix, suffix and middle, in the format's own tokens and line ends;
    everything is trained, as in pre-training.

    Args:
        files: (path, text) of each file in their order; the last one's text is given by ``parts``.
        parts: prefix, middle and suffix of the last file.

    Raises:
        ValueError: no file, or a format without tokens for a repository and its files.
    """
    tokens = [t and tokenizer.token_id(t) for t in (fim.format.repository, fim.format.file)]
    repository, file = tokens
    if not isinstance(repository, int) or not isinstance(file, int):
        raise ValueError("draft_repository: format: it has no tokens for a repository's name and its files")
    if not files:
        raise ValueError("draft_repository: files: expected at least one")
    texts = [name + fim.format.name_end, *(f"{path}\n{text}{fim.format.file_end}" for path, text in files[:-1])]
    marks = [repository, *[file] * len(files)]
    pieces = []
    for mark, text in zip(marks, [*texts, f"{files[-1][0]}\n"], strict=True):
        pieces += [Piece(mark, Segment.CONTROL), Piece(text, Segment.ANSWER)]
    last = draft_fim(parts, tokenizer, fim, spm=spm, train_context=True)
    head = len(tokenizer.prefix_ids)
    whole = (*last.pieces[:head], *pieces, *last.pieces[head:])
    before, after = last.context or (0, 0)
    return Draft(whole, WEIGHTS, weight, (before + len(pieces), after + len(pieces)))
