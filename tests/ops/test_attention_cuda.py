"""varlen_attention and its plan on a CUDA device, against the float64 reference. The same kernels run in an emulator in
tests/cuda_host."""

from __future__ import annotations

import pytest
import torch
from attention_cases import LENGTHS, assert_as_good_as, offsets, qkv

from fastsft.ops import attention, attention_plan, reference, varlen_attention
from fastsft.ops._attention_inputs import CUDA_DTYPES

pytestmark = pytest.mark.gpu

MASKS = {
    "causal": {},
    "full": {"causal": False},
    "left window": {"window": (37, -1)},
    "both sides": {"causal": False, "window": (5, 70)},
    "softcap": {"softcap": 3.0},
}
LONG = [700, 64, 65, 1, 2000, 0, 300, 33]


def results(q, k, v, cu_q, cu_k, dout, dlse, function, **options):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = function(*inputs, cu_q, cu_k, **options)
    dlse = torch.where(lse.isneginf(), 0, dlse).to(lse.dtype)
    gradients = torch.autograd.grad((out, lse), inputs, (dout.to(out.dtype), dlse))
    return [out.detach(), lse.detach().masked_fill(lse.isneginf(), 0), *gradients]


def check(lengths_q, lengths_k, heads, dim, dtype, **options):
    q, k, v = (x.cuda() for x in qkv(lengths_q, lengths_k, heads, dim, dtype))
    cu_q, cu_k = offsets(lengths_q).cuda(), offsets(lengths_k).cuda()
    dout, dlse = torch.randn_like(q), torch.randn(heads[0], q.shape[0], device="cuda")
    arguments = (cu_q, cu_k, dout, dlse)
    ours = results(q, k, v, *arguments, varlen_attention, return_lse=True, **options)
    again = results(q, k, v, *arguments, varlen_attention, return_lse=True, **options)
    low = results(q, k, v, *arguments, reference.varlen_attention, **options)
    exact = results(q.double(), k.double(), v.double(), *arguments, reference.varlen_attention, **options)
    for name, a, b, c, d in zip(("out", "lse", "dq", "dk", "dv"), ours, low, exact, again, strict=True):
        assert_as_good_as(a, b, c, name)
        assert torch.equal(a, d), f"{name}: two runs differ"


@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("dim", attention.CUDA_HEAD_DIMS)
def test_head_sizes(dim, dtype):
    check(LENGTHS, LENGTHS, (4, 2), dim, dtype)


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("heads", [(4, 4), (14, 2), (7, 1)], ids=str)
def test_masks_and_groups(heads, options):
    check(LENGTHS, LENGTHS, heads, 128, torch.bfloat16, **options)


def test_lengths_that_differ_and_long_documents():
    check([5, 90, 0, 40, 1, 70], [70, 33, 9, 0, 129, 70], (4, 2), 64, torch.bfloat16)
    check(LONG, LONG, (8, 2), 128, torch.bfloat16)
    check([], [], (2, 1), 64, torch.bfloat16)


def test_strided_and_misaligned_views():
    fused = torch.randn(300, 12, 64, device="cuda", dtype=torch.bfloat16)
    q, k, v = fused[:, :8], fused[:, 8:10], fused[:, 10:]
    cu = offsets([100, 200]).cuda()
    expected = varlen_attention(*(x.contiguous() for x in (q, k, v)), cu)
    assert torch.equal(varlen_attention(q, k, v, cu), expected)
    shifted = torch.empty(q.numel() + 1, device="cuda", dtype=q.dtype)[1:].view(q.shape).copy_(q)
    assert torch.equal(varlen_attention(shifted, k, v, cu), expected)


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_plan_is_the_mask(options):
    mask = {name: value for name, value in options.items() if name != "softcap"}
    cu_q, cu_k = offsets([5, 90, 0, 40, 1, 64]), offsets([70, 33, 9, 0, 129, 64])
    total_q, total_k = 200, 305
    plan = attention_plan(cu_q.cuda(), cu_k.cuda(), total_q=total_q, total_k=total_k, **mask)
    both = plan.memory[: 2 * (total_q + total_k)].cpu().view(-1, 2)
    lo, hi = both[:, 0], torch.where(both[:, 1] < 0, ~both[:, 1], both[:, 1])
    intervals = torch.where((lo < hi)[:, None], torch.stack([lo, hi], 1), 0)
    assert torch.equal(intervals, torch.cat(reference.attention_plan(cu_q, cu_k, **mask)))


def test_a_graph_holds_plan_forward_and_backward():
    q, k, v = (x.cuda().requires_grad_() for x in qkv(LENGTHS, LENGTHS, (4, 2), 64, torch.bfloat16))
    cu = offsets(LENGTHS).cuda()

    def step():
        out = varlen_attention(q, k, v, cu)
        return out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)
