"""Fill-in-the-middle, MinHash and clusters on a GPU: bit for bit what the CPU gives."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from samples import noisy_copies

from fastsft import ops

pytestmark = pytest.mark.gpu


def packed(count: int, longest: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(0, longest + 1, (count,), generator=generator).tolist()
    tokens = torch.randint(0, 300, (sum(lengths),), generator=generator, dtype=dtype)
    return tokens, torch.tensor([0, *itertools.accumulate(lengths)])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("count", "longest"), [(0, 0), (1, 9), (3000, 400), (3, 100_000)])
@pytest.mark.parametrize("options", [{}, {"rate": 1.0, "spm_rate": 0.3, "max_len": 300}, {"rate": 0.0}], ids=str)
def test_fim(dtype: torch.dtype, count: int, longest: int, options: dict[str, Any]) -> None:
    tokens, cu = packed(count, longest, dtype)
    expected = ops.fim_permute(tokens, cu.int(), sentinels=(301, 302, 303), seed=5, **options)
    got = ops.fim_permute(tokens.cuda(), cu.int().cuda(), sentinels=(301, 302, 303), seed=5, **options)
    for x, y in zip(got, expected, strict=True):
        assert x.is_cuda
        assert x.dtype == y.dtype
        assert torch.equal(x.cpu(), y)


def test_fim_errors_are_the_ones_of_the_cpu() -> None:
    tokens = torch.arange(5).cuda()
    with pytest.raises(ValueError, match="expected never to decrease, got 3 then 2 at document 1"):
        ops.fim_permute(tokens, torch.tensor([0, 3, 2, 5]).cuda(), sentinels=(7, 8, 9), seed=0)
    with pytest.raises(ValueError, match="expected to start with 0, got 1"):
        ops.fim_permute(tokens, torch.tensor([1, 5]).cuda(), sentinels=(7, 8, 9), seed=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("count", "longest"), [(0, 0), (3000, 400), (3, 100_000)])
@pytest.mark.parametrize(("num_perm", "ngram"), [(128, 5), (7, 1), (300, 13)])
def test_token_signatures(dtype: torch.dtype, count: int, longest: int, num_perm: int, ngram: int) -> None:
    tokens, cu = packed(count, longest, dtype)
    expected = ops.minhash_token_signatures(tokens, cu, num_perm=num_perm, ngram=ngram, seed=3)
    got = ops.minhash_token_signatures(tokens.cuda(), cu.cuda(), num_perm=num_perm, ngram=ngram, seed=3)
    assert got.is_cuda
    assert torch.equal(got.cpu().view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [None, (16, 8), (1, 128), (128, 1)])
def test_clusters(seed: int, shape: tuple[int, int] | None) -> None:
    signatures = torch.from_numpy(noisy_copies(np.random.default_rng(seed), 60, 20, 128))
    bands, rows = shape or (None, None)
    for threshold in (0.0, 0.6, 0.8, 1.0):
        expected = ops.lsh_clusters(signatures, threshold=threshold, bands=bands, rows=rows)
        got = ops.lsh_clusters(signatures.cuda(), threshold=threshold, bands=bands, rows=rows)
        assert torch.equal(got.cpu(), expected)


def test_large_clusters_cost_linear_time() -> None:
    rng = np.random.default_rng(1)
    rows = np.repeat(rng.integers(0, 2**32, (1, 128), np.uint32), 200_000, 0)
    rows[np.arange(100_000), rng.integers(0, 128, 100_000)] = np.arange(100_000, dtype=np.uint32)
    assert not ops.lsh_clusters(torch.from_numpy(rows).cuda()).any()
