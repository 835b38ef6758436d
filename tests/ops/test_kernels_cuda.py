"""Every CUDA kernel once, at tiny sizes: what compute-sanitizer runs (bench/gpu_sanitizer.py)."""

from __future__ import annotations

import pytest
import torch
from attention_cases import assert_as_good_as
from test_attention_cuda import check
from test_data_cuda import packed
from test_paged_attention import paged_case

from fastsft import ops
from fastsft.ops import reference

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.bfloat16), (128, torch.float16), (256, torch.bfloat16)], ids=str)
def test_varlen_attention(dim: int, dtype: torch.dtype) -> None:
    check([70, 1, 0, 130, 20], [70, 1, 0, 130, 20], (2, 1), dim, dtype)


@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.bfloat16), (256, torch.float16)], ids=str)
def test_paged_attention(dim: int, dtype: torch.dtype) -> None:
    case = paged_case([1, 70, 0, 3], [300, 90, 5, 17], (2, 1), dim, dtype)
    exact = reference.paged_attention(*(x.double() for x in case[:3]), *case[3:])
    assert_as_good_as(ops.paged_attention(*(x.cuda() for x in case)).cpu(), reference.paged_attention(*case), exact)


def test_linear_cross_entropy() -> None:
    hidden, weight = torch.randn(40, 32), torch.randn(203, 32) / 5
    targets = torch.randint(203, (40,)).masked_fill(torch.arange(40) % 7 == 0, -100)
    grads = []
    for device in ("cpu", "cuda"):
        inputs = [x.to(device).requires_grad_() for x in (hidden, weight)]
        loss = ops.linear_cross_entropy(*inputs, targets.to(device))
        grads.append([loss.cpu(), *(g.cpu() for g in torch.autograd.grad(loss, inputs))])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_integer_ops() -> None:
    tokens, cu = packed(50, 40, torch.int64)
    options = {"sentinels": (301, 302, 303), "seed": 5}
    permuted = ops.fim_permute(tokens.cuda(), cu.int().cuda(), **options)
    for x, y in zip(permuted, ops.fim_permute(tokens, cu.int(), **options), strict=True):
        assert torch.equal(x.cpu(), y)
    signatures = ops.minhash_token_signatures(tokens, cu, num_perm=16)
    assert torch.equal(ops.minhash_token_signatures(tokens.cuda(), cu.cuda(), num_perm=16).cpu(), signatures)
    assert torch.equal(ops.lsh_clusters(signatures.cuda()).cpu(), ops.lsh_clusters(signatures))
