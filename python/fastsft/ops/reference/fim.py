"""Fill in the middle."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

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
