"""Fill-in-the-middle: against the plain reference, by the inverse transform, and by its statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsft import _C, ops
from fastsft.ops import reference
from fastsft.ops.fim import FimResult

PRE, SUF, MID = SENTINELS = (200_001, 200_002, 200_003)


def packed(lengths: list[int], dtype: torch.dtype = torch.int64) -> tuple[torch.Tensor, torch.Tensor]:
    cu = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return torch.arange(10, 10 + int(cu[-1]), dtype=dtype), cu


def pieces(row: list[int], mode: int) -> tuple[list[int], list[int], list[int]]:
    """Prefix, middle, suffix of a rearranged row, found by its sentinels; for SPM prefix + middle come joined."""
    suf, mid = row.index(SUF), row.index(MID)
    assert row[0] == PRE
    assert sum(t in SENTINELS for t in row) == 3
    if mode == 1:
        return row[1:suf], row[mid + 1 :], row[suf + 1 : mid]
    assert suf == 1
    return row[mid + 1 :], [], row[2:mid]


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=12),
    seed=st.integers(0, 2**63 - 1),
    rate=st.sampled_from([0.0, 0.3, 1.0]),
    spm_rate=st.sampled_from([0.0, 0.5, 1.0]),
    max_len=st.sampled_from([None, 0, 20]),
    wide=st.booleans(),
)
def test_equals_reference(
    lengths: list[int], seed: int, rate: float, spm_rate: float, max_len: int | None, wide: bool
) -> None:
    tokens, cu = packed(lengths, torch.int64 if wide else torch.int32)
    options = {"sentinels": SENTINELS, "seed": seed, "rate": rate, "spm_rate": spm_rate, "max_len": max_len}
    got = ops.fim_permute(tokens, cu, **options)
    expected = reference.fim_permute(tokens.tolist(), cu.tolist(), **options)
    assert tuple(x.tolist() for x in got) == expected
    assert got.tokens.dtype == tokens.dtype
    assert got.cu_seqlens.dtype == cu.dtype


def test_inverse() -> None:
    lengths = [n % 53 for n in range(500)]
    tokens, cu = packed(lengths)
    got = ops.fim_permute(tokens, cu, sentinels=SENTINELS, seed=7, rate=0.9)
    mark = got.source_index < 0
    assert torch.equal(got.tokens[~mark], tokens[got.source_index[~mark]])
    restored = torch.empty_like(tokens)
    restored[got.source_index[~mark]] = got.tokens[~mark]
    assert torch.equal(restored, tokens)
    for b, mode in enumerate(got.mode.tolist()):
        row = got.tokens[got.cu_seqlens[b] : got.cu_seqlens[b + 1]].tolist()
        document = tokens[cu[b] : cu[b + 1]].tolist()
        if mode:
            prefix, middle, suffix = pieces(row, mode)
            row = prefix + middle + suffix
        assert row == document


def test_statistics() -> None:
    """Rates within 4 standard errors; cut points uniform on 0..length inclusive (chi-square on min and max jointly)."""
    docs, length = 40_000, 3
    tokens, cu = packed([length] * docs)
    got = ops.fim_permute(tokens, cu, sentinels=SENTINELS, seed=11, rate=0.3, spm_rate=0.7)
    chosen = got.mode > 0
    assert abs(chosen.float().mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / docs)
    assert abs((got.mode[chosen] == 2).float().mean() - 0.7) < 4 * math.sqrt(0.7 * 0.3 / int(chosen.sum()))

    got = ops.fim_permute(tokens, cu, sentinels=SENTINELS, seed=12, rate=1.0, spm_rate=0.0)
    rows = got.tokens.view(docs, length + 3)
    suf, mid = (rows == SUF).nonzero()[:, 1], (rows == MID).nonzero()[:, 1]
    begin, end = suf - 1, length - (mid - suf - 1)
    counts = torch.zeros(length + 1, length + 1).index_put_((begin, end), torch.ones(docs), accumulate=True)
    chi, cells = 0.0, 0
    for i in range(length + 1):
        for j in range(i, length + 1):
            expected = docs * (1 if i == j else 2) / (length + 1) ** 2
            chi += (float(counts[i, j]) - expected) ** 2 / expected
            cells += 1
    assert chi < cells - 1 + 4 * math.sqrt(2 * (cells - 1))
    assert counts.tril(-1).sum() == 0


def test_depends_on_document_identity_only() -> None:
    tokens, cu = packed([20] * 50)
    ids = torch.arange(1000, 1050)
    whole = ops.fim_permute(tokens, cu, sentinels=SENTINELS, seed=3, doc_ids=ids)
    for b in (0, 17, 49):
        alone = ops.fim_permute(
            tokens[20 * b : 20 * b + 20], torch.tensor([0, 20]), sentinels=SENTINELS, seed=3, doc_ids=ids[b : b + 1]
        )
        assert torch.equal(alone.tokens, whole.tokens[whole.cu_seqlens[b] : whole.cu_seqlens[b + 1]])
    other = ops.fim_permute(tokens, cu, sentinels=SENTINELS, seed=4, doc_ids=ids)
    assert other.mode.tolist() != whole.mode.tolist()


def test_spans() -> None:
    tokens, cu = packed([5, 0, 4])
    spans = torch.tensor([[1, 3], [0, 0], [0, 4]])
    got = ops.fim_permute(tokens, cu, sentinels=SENTINELS, seed=0, rate=1.0, spm_rate=0.0, spans=spans)
    assert got.tokens.tolist() == [PRE, 10, SUF, 13, 14, MID, 11, 12, PRE, SUF, MID, 15, 16, 17, 18]
    assert got.mode.tolist() == [1, 0, 1]
    for bad in ([[1, 6]], [[3, 2]], [[-1, 2]]):
        with pytest.raises(ValueError, match=r"spans: expected 0 <= begin <= end <= 5 at document 0"):
            ops.fim_permute(tokens[:5], cu[:2], sentinels=SENTINELS, seed=0, spans=torch.tensor(bad))


def test_numpy_in_numpy_out() -> None:
    tokens, cu = packed([7, 9, 0, 30], torch.int32)
    expected = ops.fim_permute(tokens, cu, sentinels=SENTINELS, seed=5, rate=1.0)
    got = ops.fim_permute(tokens.numpy(), cu.numpy(), sentinels=SENTINELS, seed=5, rate=1.0)
    assert isinstance(got, FimResult)
    for a, b in zip(got, expected, strict=True):
        assert isinstance(a, np.ndarray)
        assert a.tolist() == b.tolist()
    strided = ops.fim_permute(tokens.repeat_interleave(2)[::2], cu, sentinels=SENTINELS, seed=5, rate=1.0)
    assert torch.equal(strided.tokens, expected.tokens)


def test_same_bits_on_every_isa_and_thread_count() -> None:
    tokens, cu = packed([n % 91 for n in range(2000)])
    results = []
    for name in _C.available_isas():
        for n in (1, 3):
            _C.set_isa(name)
            _C.set_num_threads(n)
            results.append(ops.fim_permute(tokens, cu, sentinels=SENTINELS, seed=1))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_opcheck_and_compile() -> None:
    tokens, cu = packed([7, 9, 0, 30])
    args = (tokens, cu, torch.arange(4), None, list(SENTINELS), 5, 1.0, 0.5, None)
    torch.library.opcheck(torch.ops.fastsft.fim_permute.default, args)

    def doubled(tokens: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
        return ops.fim_permute(tokens, cu, sentinels=SENTINELS, seed=5, rate=1.0).tokens * 2

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=torch.__version__ < (2, 10)):
        assert torch.equal(compiled(tokens, cu), doubled(tokens, cu))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": 1.5}, r"rate: expected a number in \[0, 1\], got 1.5"),
        ({"rate": math.nan}, "rate: expected a number"),
        ({"spm_rate": -0.5}, r"spm_rate: expected a number in \[0, 1\], got -0.5"),
        ({"seed": -1}, "seed: expected an integer"),
        ({"max_len": -1}, "max_len: expected None or"),
        ({"sentinels": (1, 2)}, "sentinels: expected 3 token ids"),
        ({"sentinels": (1, 2, 2**31)}, "sentinels: expected 3 token ids"),
        ({"tokens": torch.zeros(5)}, "tokens: expected int32 or int64, got torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "expected to end with the 5 tokens given, got 4"),
        ({"cu_seqlens": torch.tensor([1, 5])}, "expected to start with 0, got 1"),
        ({"cu_seqlens": torch.tensor([0, 5, 3, 5])}, "never to decrease, got 5 then 3 at document 1"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int32)}, r"cu_seqlens: expected int32 or int64 \[B \+ 1\]"),
        ({"doc_ids": torch.tensor([1, 2])}, "doc_ids"),
    ],
)
def test_errors(change: dict[str, object], message: str) -> None:
    arguments = {
        "tokens": torch.arange(5, dtype=torch.int32),
        "cu_seqlens": torch.tensor([0, 5]),
        "sentinels": (7, 8, 9),
        "seed": 0,
    }
    with pytest.raises(ValueError, match=message):
        ops.fim_permute(**(arguments | change))
