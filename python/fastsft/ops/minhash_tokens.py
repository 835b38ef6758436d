"""MinHash signatures of documents that are token ids already."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastsft import _C
from fastsft.ops import _library
from fastsft.ops._texts import Array


def _fake_token_signatures(
    tokens: torch.Tensor, cu_seqlens: torch.Tensor, num_perm: int, ngram: int, seed: int
) -> torch.Tensor:
    return tokens.new_empty((cu_seqlens.shape[0] - 1, num_perm), dtype=torch.uint32)


def _native_token_signatures(
    tokens: torch.Tensor, cu_seqlens: torch.Tensor, num_perm: int, ngram: int, seed: int
) -> torch.Tensor:
    out = _fake_token_signatures(tokens, cu_seqlens, num_perm, ngram, seed)
    cu = cu_seqlens.to(torch.int64).contiguous()
    _C.minhash_token_signatures(tokens.contiguous(), cu, ngram, seed, out)
    return out


_token_signatures = _library.define(
    "minhash_token_signatures(Tensor tokens, Tensor cu_seqlens, SymInt num_perm, SymInt ngram, SymInt seed) -> Tensor",
    fake=_fake_token_signatures,
    cpu=_native_token_signatures,
    cuda=_native_token_signatures,
    cuda_is=_library.ON_CUDA,
)


def minhash_token_signatures(
    tokens: Array, cu_seqlens: Array, *, num_perm: int = 128, ngram: int = 5, seed: int = 0
) -> Any:
    """:func:`minhash_signatures` of documents that are token ids already: the unit is a token.

    A document with fewer than ``ngram`` tokens has one n-gram, all of it; an empty one has the signature 0xFFFFFFFF
    throughout.

    Args:
        tokens: [T] int32 or int64, documents one after the other, torch or numpy; the low 32 bits of an id count.
        cu_seqlens: [N + 1] int32 or int64, document i is ``tokens[cu_seqlens[i] : cu_seqlens[i + 1]]``.
        num_perm: columns, i.e. hash functions.
        ngram: tokens per n-gram; at most 4096 on CUDA.
        seed: 0 <= seed < 2^63; signatures are comparable only within one (seed, num_perm, ngram) and one tokenizer.

    Returns:
        uint32 [N, num_perm], numpy where ``tokens`` is; the same bits on every machine.

    Raises:
        ValueError: a wrong dtype or shape, broken ``cu_seqlens`` (not looked at on CUDA: the signatures are then
            unspecified), a bad option.
    """
    as_numpy = isinstance(tokens, np.ndarray)
    ids, cu = (
        torch.from_numpy(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x for x in (tokens, cu_seqlens)
    )
    op = "minhash_token_signatures"
    for name, x, shape in (("tokens", ids, "[T]"), ("cu_seqlens", cu, "[N + 1]")):
        if x.ndim != 1 or x.dtype not in (torch.int32, torch.int64) or (x is cu and x.numel() == 0):
            raise ValueError(f"{op}: {name}: expected int32 or int64 {shape}, got {x.dtype}{list(x.shape)}")
    if num_perm < 1:
        raise ValueError(f"{op}: num_perm: expected >= 1, got {num_perm}")
    if ngram < 1:
        raise ValueError(f"{op}: ngram: expected >= 1, got {ngram}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"{op}: seed: expected an integer in [0, 2^63), got {seed}")
    out = _token_signatures(ids, cu, num_perm, ngram, seed)
    return out.numpy() if as_numpy else out
