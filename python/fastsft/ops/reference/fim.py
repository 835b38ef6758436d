"""Fill in the middle."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from fastsft.ops.reference.rng import philox


def fim_permute(
    tokens: Sequence[int],
    cu_seqlens: Sequence[int],
    *,
    sentinels: tuple[int, int, int],
    seed: int,
    rate: float = 0.5,
    spm_rate: float = 0.5,
    spans: Sequence[tuple[int, int]] | None = None,
    max_len: int | None = None,
    doc_ids: Sequence[int] | None = None,
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Lists in, lists out: (tokens, cu_seqlens, source_index, mode)."""
    prefix, suffix, middle = (-1 - s for s in sentinels)  # negative marks in the source index until the end
    source: list[int] = []
    bounds, modes = [0], []
    for b, (begin, end) in enumerate(itertools.pairwise(cu_seqlens)):
        length = end - begin
        x = philox(seed, b if doc_ids is None else doc_ids[b], 0x46494D << 32)
        cuts = sorted(bits * (length + 1) >> 32 for bits in x[2:]) if spans is None else spans[b]
        m0, m1 = begin + cuts[0], begin + cuts[1]
        p, m, s = list(range(begin, m0)), list(range(m0, m1)), list(range(m1, end))
        mode = 0
        if length > 0 and (max_len is None or length + 3 <= max_len) and x[0] < round(rate * 2**32):
            mode = 2 if x[1] < round(spm_rate * 2**32) else 1
        source += [p + m + s, [prefix, *p, suffix, *s, middle, *m], [prefix, suffix, *s, middle, *p, *m]][mode]
        bounds.append(len(source))
        modes.append(mode)
    out = [int(tokens[i]) if i >= 0 else -1 - i for i in source]
    return out, bounds, [max(i, -1) for i in source], modes


def fim_rows(
    tokens: Sequence[int],
    cu_seqlens: Sequence[int],
    *,
    psm: Sequence[int],
    spm: Sequence[int] | None = None,
    plain: Sequence[int] = (-1,),
    seed: int,
    rate: float = 0.5,
    spm_rate: float = 0.5,
    unit: str = "token",
    decode: Callable[[Sequence[int]], str] | None = None,
    encode: Callable[[str], list[int]] | None = None,
    spans: Sequence[tuple[int, int]] | None = None,
    max_len: int | None = None,
    doc_ids: Sequence[int] | None = None,
    train_context: bool = True,
) -> list[tuple[list[int], list[int], int, tuple[int, int], list[tuple[int, int]], list[int]]]:
    """Each document as (tokens, targets, mode, cut, bounds, middle_left). Pieces are encoded whole by ``encode``."""
    rows = []
    for b, (begin, end) in enumerate(itertools.pairwise(cu_seqlens)):
        ids = [int(t) for t in tokens[begin:end]]
        x = philox(seed, b if doc_ids is None else doc_ids[b], 0x46494D << 32)
        mode = 0
        if ids and x[0] < round(rate * 2**32):
            mode = 2 if x[1] < round(spm_rate * 2**32) else 1
        text = decode(ids) if decode is not None and unit != "token" else ""
        if unit == "token":
            places = list(range(len(ids) + 1))
        elif unit == "character":
            places = [len(text[:i].encode()) for i in range(len(text) + 1)]
        else:
            starts = [i + 1 for i, c in enumerate(text) if c == "\n" and i + 1 < len(text)]
            places = [len(text[:i].encode()) for i in [0, *starts, len(text)]] if text else [0]
        first, second = sorted(places[bits * len(places) >> 32] for bits in x[2:])
        if spans is not None:
            first, second = spans[b]
        if unit == "token":
            parts = [ids[:first], ids[first:second], ids[second:]]
        else:
            data = text.encode()
            cut = (data[:first], data[first:second], data[second:])
            parts = [encode(part.decode()) if encode is not None else [] for part in cut]
        layout = [plain, psm, psm if spm is None else spm][mode]
        if max_len is not None and len(layout) - 3 + sum(map(len, parts)) > max_len:
            mode, layout = 0, plain
        if mode == 0:
            parts = [ids, [], []]
        row: list[int] = []
        bounds = [(-1, -1)] * 3
        for item in layout:
            piece = parts[-1 - item] if item < 0 else [item]
            if item < 0:
                bounds[-1 - item] = (len(row), len(row) + len(piece))
            row += piece
        bounds = [(len(row), len(row)) if bound == (-1, -1) else bound for bound in bounds]
        at, stop = bounds[1]
        targets = [*row[1:], -100][: len(row)]
        if mode and not train_context:
            targets = [-100 if i < at - 1 else t for i, t in enumerate(targets)]
        left = [stop - 1 - i if mode and at - 1 <= i < stop else -1 for i in range(len(row))]
        rows.append((row, targets, mode, (first, second), bounds, left))
    return rows
