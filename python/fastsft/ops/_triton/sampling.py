"""Draws in Triton: the contract of csrc/include/fastsft/sampling.h, the noise's logarithms to a few units in the last
place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsft.ops._triton import LAUNCH

_BLOCK, _WARPS = 4096, 8


# Per logit: 4 bytes read, ten rounds of Philox (about 80 integer operations), two logarithms. 64 rows of 151,936 are
# 39 MB, 8 us of an H200's memory, and 0.8 G integer operations, as long: the two overlap. A chunk leaves 8 bytes.
@triton.jit
def _best(
    scores, temperature, seeds, positions, best, index, vocab, CHUNKS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    z = tl.load(scores + row * vocab + token, mask=inside, other=float("-inf"))
    t = tl.load(temperature + row)
    if t > 0:
        position = tl.load(positions + row).to(tl.uint64, bitcast=True)
        low, high = (position & 0xFFFFFFFF).to(tl.uint32), (position >> 32).to(tl.uint32)
        counter = token.to(tl.uint32)
        bits, _, _, _ = tl.philox(tl.load(seeds + row), counter, counter * 0, counter * 0 + low, counter * 0 + high)
        w = tl.minimum(((bits >> 1).to(tl.float32) + 0.5) * 4.656612873077393e-10, 1 - 5.960464477539063e-08)
        # log(1 - w), w near 0 included: the rounding of 1 - w is in both factors (Higham, section 1.14.1)
        u = 1 - w
        exact = tl.where(u == 1, w, -tl.log(u) * (w / tl.where(u == 1, 1.0, 1 - u)))
        z = z - tl.log(exact)
    at = row * CHUNKS + chunk
    value, place = tl.max(z, 0, return_indices=True)  # the lowest index on ties
    tl.store(best + at, value)
    tl.store(index + at, chunk * BLOCK + place)


def best_tokens(scores: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """float32 [R, V], contiguous -> int64 [R]: argmax of a row plus, where its temperature is above 0, its noise."""
    rows, vocab = scores.shape
    chunks = triton.cdiv(vocab, _BLOCK)
    best, index = scores.new_empty(rows, chunks), scores.new_empty(rows, chunks, dtype=torch.int64)
    if rows:
        _best[(rows, chunks)](
            scores, temperature, seeds, positions, best, index, vocab,
            CHUNKS=chunks, BLOCK=_BLOCK, num_warps=_WARPS, **LAUNCH,
        )  # fmt: skip
    return index.gather(1, best.argmax(1, keepdim=True))[:, 0]
