"""Documents to training rows: fill-in-the-middle with targets and positions in one pass (arXiv 2207.14255)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastsft import _C
from fastsft.ops import _registry
from fastsft.ops._texts import Array
from fastsft.ops.bpe import ByteBpe, classify

if TYPE_CHECKING:
    import torch

_registry.record(
    "fim_rows",
    cpu=_registry.Implementation("native", "C++ kernel"),
    cuda=_registry.Implementation("none", "rows are made on the CPU, where the texts are"),
)

UNITS = ("token", "character", "line", "syntax")
PREFIX, MIDDLE, SUFFIX = -1, -2, -3  # in a layout, in place of a token id


class FimRows(NamedTuple):
    """What :func:`fim_rows` returns: torch tensors, or numpy arrays if ``tokens`` was one. U: tokens of all rows."""

    tokens: Any  # [U], dtype of the input
    targets: Any  # [U]: the next token of the row, -100 where nothing is trained
    position_ids: Any  # [U], from 0 in each row
    cu_seqlens: Any  # int64 [B + 1]
    mode: Any  # int8 [B]: 0 left as it was, 1 PSM, 2 SPM, -1 left because only the tokenizer itself can cut it
    cuts: Any  # int64 [B, 2]: the middle, in tokens or in bytes of the text; -1 where the text is not known
    bounds: Any  # int64 [B, 6]: begin and end of prefix, middle and suffix in the row
    middle_left: Any  # [U] or None: tokens of the middle after this one; -1 outside the middle and the place before it


def fim_rows(
    tokens: Array,
    cu_seqlens: Array,
    *,
    psm: Sequence[int],
    spm: Sequence[int] | None = None,
    plain: Sequence[int] = (PREFIX,),
    seed: int,
    rate: float = 0.5,
    spm_rate: float = 0.5,
    unit: str = "token",
    encoder: ByteBpe | None = None,
    spans: Array | None = None,
    max_len: int | None = None,
    doc_ids: Array | None = None,
    train_context: bool = True,
    middle_left: bool = False,
) -> FimRows:
    """Rearranges packed documents for fill-in-the-middle training, by the layout of any model family, and adds targets
    and positions.

    With unit "token" the cuts and the draws are those of :func:`fim_permute`. With "character" or "line" a document is
    cut between two characters or where a line begins (or ends the text); with "syntax" around a statement, block or
    pair of brackets of Python source, or as with "character" where it has none. Every piece has exactly the ids that
    the tokenizer gives it by itself: only the few tokens next to a cut are encoded anew. Draws come from Philox keyed
    by (seed, document id), so that a row depends neither on the other documents nor on threads.

    Args:
        tokens: [T] int32 or int64 on the CPU, documents one after the other; torch or numpy. Except with "token": the
            ids that the tokenizer gives each document's text.
        cu_seqlens: [B + 1] int32 or int64, document b is ``tokens[cu_seqlens[b] : cu_seqlens[b + 1]]``.
        psm, spm: token ids in the order of the row, with -1, -2, -3 for prefix, middle, suffix. None: as ``psm``.
        plain: likewise for a document left as it is, which is all prefix.
        seed: 0 <= seed < 2^63.
        rate: probability that a document is rearranged. Empty documents never are.
        spm_rate: among those, the probability of ``spm``.
        unit: "token", "character", "line" or "syntax".
        encoder: the tokenizer's vocabulary, for every unit but "token".
        spans: integers [B, 2]: the middle as [begin, end), in tokens for unit "token" and in bytes of the UTF-8 text
            otherwise, in place of the random cuts.
        max_len: a document whose row would be longer stays as it is.
        doc_ids: integers [B], the documents' identities for the random numbers; 0..B-1 by default.
        train_context: targets everywhere in a rearranged row; False: from the middle's first token on.
        middle_left: also give the number of middle tokens left (arXiv 2410.03103).

    Returns:
        :class:`FimRows`. A document stays as it is with mode -1 where one of its ids is no plain piece of text (an
        added token), or where a cut falls near an unbroken run of more than 2048 letters or the like.

    Raises:
        ValueError: a wrong dtype or shape, broken ``cu_seqlens``, a span outside its document, a layout with a piece
            missing, an option out of range.
    """
    import torch

    as_numpy = isinstance(tokens, np.ndarray)
    ids = _as_tensor(tokens).contiguous()
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"fim_rows: tokens: expected int32 or int64, got {ids.dtype}")
    cu = _as_tensor(cu_seqlens)
    if cu.ndim != 1 or cu.numel() == 0 or cu.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"fim_rows: cu_seqlens: expected int32 or int64 [B + 1], got {cu.dtype}{list(cu.shape)}")
    cu = cu.to(torch.int64).contiguous()
    docs, middles = (None if x is None else _as_tensor(x).to(torch.int64).contiguous() for x in (doc_ids, spans))
    options = _options(seed, rate, spm_rate, max_len, unit, train_context, plain, psm, psm if spm is None else spm)
    native = None if encoder is None else encoder.native
    wide = ids.dtype == torch.int64

    def first_pass() -> Any:
        return (_C.FimRowsInt64 if wide else _C.FimRowsInt32)(ids, cu, docs, middles, options, native)

    rows = first_pass()
    while rows.unknown:  # characters met for the first time
        classify(rows.unknown)
        rows = first_pass()
    num_docs = cu.numel() - 1
    out, targets, positions = (ids.new_empty(rows.num_tokens) for _ in range(3))
    left = ids.new_empty(rows.num_tokens) if middle_left else None
    mode, cuts, bounds = ids.new_empty(num_docs, dtype=torch.int8), cu.new_empty(num_docs, 2), cu.new_empty(num_docs, 6)
    rows.write(out, targets, positions, left, mode, cuts, bounds)
    found = FimRows(out, targets, positions, cu.new_tensor(rows.cu_seqlens), mode, cuts, bounds, left)
    return FimRows(*(None if x is None else x.numpy() for x in found)) if as_numpy else found


def _as_tensor(x: Array) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x


def fim_cuts(
    texts: Sequence[str],
    *,
    seed: int,
    rate: float = 0.5,
    spm_rate: float = 0.5,
    unit: str = "character",
    doc_ids: Sequence[int] | Array | None = None,
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int64]]:
    """Where :func:`fim_rows` cuts these texts: for tokenizers that have to encode each piece themselves.

    Args:
        texts: N strings.
        seed, rate, spm_rate, doc_ids: as in :func:`fim_rows`.
        unit: "character", "line" or "syntax".

    Returns:
        mode int8 [N] (0, 1 PSM, 2 SPM) and the middle int64 [N, 2], in bytes of the UTF-8 text.

    Raises:
        ValueError: an option out of range, or a text that UTF-8 cannot encode.
    """
    if unit not in UNITS[1:]:
        raise ValueError(f"fim_cuts: unit: expected one of {UNITS[1:]}, got {unit!r}")
    every = (PREFIX, MIDDLE, SUFFIX)
    options = _options(seed, rate, spm_rate, None, unit, True, every[:1], every, every)
    mode, cuts = np.empty(len(texts), np.int8), np.empty((len(texts), 2), np.int64)
    docs = None if doc_ids is None else np.ascontiguousarray(doc_ids, np.int64)
    _C.fim_cuts([text.encode() for text in texts], docs, options, mode, cuts)
    return mode, cuts


def _options(
    seed: int,
    rate: float,
    spm_rate: float,
    max_len: int | None,
    unit: str,
    train_context: bool,
    plain: Sequence[int],
    psm: Sequence[int],
    spm: Sequence[int],
) -> Any:
    if unit not in UNITS:
        raise ValueError(f"fim_rows: unit: expected one of {UNITS}, got {unit!r}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"fim_rows: seed: expected an integer in [0, 2^63), got {seed}")
    if max_len is not None and max_len < 0:
        raise ValueError(f"fim_rows: max_len: expected None or an integer >= 0, got {max_len}")
    for name, layout in (("plain", plain), ("psm", psm), ("spm", spm)):
        if any(not -3 <= item < 2**31 for item in layout):
            raise ValueError(f"fim_rows: {name}: expected token ids and -1, -2, -3, got {list(layout)}")
    limit = -1 if max_len is None else max_len
    return _C.FimRowOptions(
        seed, float(rate), float(spm_rate), limit, UNITS.index(unit), train_context, list(plain), list(psm), list(spm)
    )
