"""Fill-in-the-middle on token ids (Bavarian et al., arXiv 2207.14255)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fastsft import _C
from fastsft.ops import _library

Array = torch.Tensor | npt.NDArray[Any]


class FimResult(NamedTuple):
    """What :func:`fim_permute` returns: torch tensors, or numpy arrays if ``tokens`` was one."""

    tokens: Any  # [U], dtype of the input
    cu_seqlens: Any  # [B + 1], dtype of the input
    source_index: Any  # int64 [U]: position in the input tokens, -1 for a sentinel
    mode: Any  # int8 [B]: 0 untouched, 1 PSM, 2 SPM


Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _fim(
    tokens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    doc_ids: torch.Tensor | None,
    spans: torch.Tensor | None,
    sentinels: Sequence[int],
    seed: int,
    rate: float,
    spm_rate: float,
    max_len: int | None,
) -> Outputs:
    if tokens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"fim_permute: tokens: expected int32 or int64, got {tokens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() == 0 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"fim_permute: cu_seqlens: expected int32 or int64 [B + 1], got {cu_seqlens.dtype}{list(cu_seqlens.shape)}"
        )
    limit = torch.iinfo(tokens.dtype).max
    if len(sentinels) != 3 or not all(0 <= s <= limit for s in sentinels):
        raise ValueError(f"fim_permute: sentinels: expected 3 token ids in [0, {limit}], got {list(sentinels)}")
    if seed < 0:
        raise ValueError(f"fim_permute: seed: expected an integer in [0, 2^63), got {seed}")
    if max_len is not None and max_len < 0:
        raise ValueError(f"fim_permute: max_len: expected None or an integer >= 0, got {max_len}")
    tokens = tokens.contiguous()
    cu = cu_seqlens.to(torch.int64).contiguous()
    num_docs = cu.numel() - 1
    mode = tokens.new_empty(num_docs, dtype=torch.int8)
    cuts = cu.new_empty(num_docs, 2)
    out_cu = torch.zeros_like(cu)
    ids, middles = (None if x is None else x.to(torch.int64).contiguous() for x in (doc_ids, spans))
    options = (seed, rate, spm_rate, -1 if max_len is None else max_len)
    broken = tokens.new_zeros(1, dtype=torch.int32) if tokens.is_cuda else None
    total = _C.fim_plan(cu, tokens.numel(), ids, middles, *options, mode, cuts, out_cu, broken)
    if broken is not None:
        out_cu.cumsum_(0)
        total, is_broken = torch.cat([out_cu[-1:], broken]).tolist()  # waits for the device
        if is_broken or num_docs == 0:  # the CPU's first pass says what is wrong
            host = [None if x is None else x.cpu() for x in (tokens, cu_seqlens, doc_ids, spans)]
            outputs = _op(*host, sentinels, seed, rate, spm_rate, max_len)
            return tuple(x.to(tokens.device) for x in outputs)
    if cu_seqlens.dtype == torch.int32 and total > torch.iinfo(torch.int32).max:
        raise ValueError(f"fim_permute: cu_seqlens: expected int64 for {total} output tokens, got int32")
    out_tokens = tokens.new_empty(total)
    source_index = cu.new_empty(total)
    copy = _C.fim_copy_int32 if tokens.dtype == torch.int32 else _C.fim_copy_int64
    copy(tokens, cu, mode, cuts, out_cu, list(sentinels), out_tokens, source_index)
    return out_tokens, out_cu.to(cu_seqlens.dtype, copy=True), source_index, mode


def _fake(tokens: torch.Tensor, cu_seqlens: torch.Tensor, *_: Any) -> Outputs:
    size = torch.library.get_ctx().new_dynamic_size()
    return (
        tokens.new_empty(size),
        torch.empty_like(cu_seqlens),
        tokens.new_empty(size, dtype=torch.int64),
        tokens.new_empty(cu_seqlens.shape[0] - 1, dtype=torch.int8),
    )


_op = _library.define(
    "fim_permute(Tensor tokens, Tensor cu_seqlens, Tensor? doc_ids, Tensor? spans, int[] sentinels, SymInt seed, "
    "float rate, float spm_rate, SymInt? max_len) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    cpu=_fim,
    cuda=_fim,
    cuda_is=_library.ON_CUDA,
)


def fim_permute(
    tokens: Array,
    cu_seqlens: Array,
    *,
    sentinels: Sequence[int],
    seed: int,
    rate: float = 0.5,
    spm_rate: float = 0.5,
    spans: Array | None = None,
    max_len: int | None = None,
    doc_ids: Array | None = None,
) -> FimResult:
    """Rearranges packed documents for fill-in-the-middle training.

    A chosen document is cut at two points, each uniform on 0..length inclusive, into prefix P, middle M, suffix S and
    becomes ``PRE P SUF S MID M`` (PSM) or ``PRE SUF S MID P M`` (SPM, the paper's second variant). Draws come from
    Philox keyed by (seed, document id): the result depends neither on the order of the documents nor on threads, and is
    the same on CUDA. There the number of output tokens has to be read back: the call waits for the device once.
    ``torch.compile(fullgraph=True)`` of a torch before 2.10 needs
    ``torch._dynamo.config.capture_dynamic_output_shape_ops = True``.

    Args:
        tokens: [T] int32 or int64, documents one after the other; torch or numpy.
        cu_seqlens: [B + 1] int32 or int64, document b is ``tokens[cu_seqlens[b] : cu_seqlens[b + 1]]``.
        sentinels: token ids (prefix, suffix, middle).
        seed: 0 <= seed < 2^63.
        rate: probability that a document is rearranged. Empty documents never are.
        spm_rate: probability that a rearranged document is SPM rather than PSM.
        spans: integers [B, 2]: the middle as [begin, end) within each document, in place of the random cuts.
        max_len: a document that would become longer than this stays untouched.
        doc_ids: integers [B], the documents' identities for the random numbers; 0..B-1 by default.

    Returns:
        :class:`FimResult` (tokens, cu_seqlens, source_index, mode). ``weights[source_index]`` carries per-token
        values along; sentinels have source_index -1.

    Raises:
        ValueError: wrong dtype or shape, broken ``cu_seqlens``, a span outside its document, a rate outside [0, 1].
    """
    as_numpy = isinstance(tokens, np.ndarray)
    inputs = [
        torch.from_numpy(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x
        for x in (tokens, cu_seqlens, doc_ids, spans)
    ]
    outputs = _op(*inputs, list(sentinels), seed, float(rate), float(spm_rate), max_len)
    return FimResult(*(x.numpy() for x in outputs)) if as_numpy else FimResult(*outputs)
