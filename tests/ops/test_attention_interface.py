"""varlen_attention as torch and its callers see it: strides, autograd, tracing, plans, errors."""

from __future__ import annotations

import pytest
import torch
from attention_cases import LENGTHS, offsets, options_of, qkv

from fastsft.ops import attention, attention_plan, reference, varlen_attention
from fastsft.ops._attention_torch import torch_backward, torch_forward


def test_strided_views_are_read_in_place():
    tokens, heads_q, heads_k, dim = 70, 4, 2, 64
    fused = torch.randn(tokens, heads_q + 2 * heads_k, dim, generator=torch.Generator().manual_seed(4))
    views = fused.split([heads_q, heads_k, heads_k], dim=1)
    head_major = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in views]
    expected = varlen_attention(*(x.contiguous() for x in views), offsets([30, 40]))
    assert torch.equal(varlen_attention(*views, offsets([30, 40])), expected)
    assert torch.equal(varlen_attention(*head_major, offsets([30, 40])), expected)
    leaf = fused.clone().requires_grad_()
    varlen_attention(*leaf.split([heads_q, heads_k, heads_k], dim=1), offsets([30, 40])).sum().backward()
    parts = [x.contiguous().requires_grad_() for x in views]
    varlen_attention(*parts, offsets([30, 40])).sum().backward()
    assert torch.equal(leaf.grad, torch.cat([x.grad for x in parts], dim=1))


def test_partial_gradients():
    q, k, v = qkv([40], [40], (2, 1), 32)
    v.requires_grad_()
    varlen_attention(q, k, v, offsets([40])).sum().backward()
    assert v.grad is not None
    assert q.grad is None
    with torch.no_grad():
        assert not varlen_attention(q, k, v, offsets([40])).requires_grad


def test_a_second_backward_is_refused():
    q, k, v = (x.requires_grad_() for x in qkv([9], [9], (2, 1), 32))
    out = varlen_attention(q, k, v, offsets([9]))
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_opcheck():
    q, k, v = qkv([30, 70], [30, 70], (4, 2), 64)
    cu = offsets([30, 70])
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.fastsft.varlen_attention_fwd, (q, k, v, cu, cu, *options_of()), test_utils=utils)
    out, lse = varlen_attention(q, k, v, cu, return_lse=True)
    arguments = (torch.ones_like(out), q, k, v, out, lse, None, cu, cu, *options_of())
    torch.library.opcheck(torch.ops.fastsft.varlen_attention_bwd, arguments, test_utils=utils)
    torch.library.opcheck(torch.ops.fastsft.attention_plan, (cu, cu, 100, 100, True, -1, -1), test_utils=utils)


def test_compiles_without_graph_breaks():
    lengths = [30, 70]
    cu = offsets(lengths)

    def function(q, k, v):
        out, lse = varlen_attention(q * 2, k, v, cu, return_lse=True)
        return (out * out).sum() + lse.sum()

    eager_in = [x.requires_grad_() for x in qkv(lengths, lengths, (4, 2), 64)]
    compiled_in = [x.detach().clone().requires_grad_() for x in eager_in]
    eager = function(*eager_in)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*compiled_in)
    torch.testing.assert_close(compiled, eager)
    eager.backward()
    compiled.backward()
    for a, b in zip(eager_in, compiled_in, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_plain_torch_implementation_agrees():
    """What serves CUDA tensors until kernels exist, run on CPU tensors."""
    q, k, v = qkv([30, 0, 70], [33, 2, 50], (4, 2), 64)
    cu_q, cu_k = offsets([30, 0, 70]), offsets([33, 2, 50])
    arguments = (cu_q, cu_k, *options_of(softcap=2.0, window_left=40))
    out, lse = attention._native_forward(q, k, v, *arguments)
    for a, b in zip(torch_forward(q, k, v, *arguments), (out, lse), strict=True):
        torch.testing.assert_close(a, b)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    native = attention._native_backward(dout, q, k, v, out, lse, dlse, *arguments)
    for a, b in zip(torch_backward(dout, q, k, v, out, lse, dlse, *arguments), native, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(8, 3, 64)}, r"q: expected a number of heads that is a multiple .* \(2\), got 3"),
        (dict(zip("qkv", torch.zeros(3, 8, 2, 48), strict=True)), "q: expected a head size in .*, got 48"),
        ({"q": torch.zeros(8, 256)}, r"q: expected \[Tq, Hq, D\], got \[8, 256\]"),
        ({"v": torch.zeros(8, 1, 64)}, r"v: expected the shape of k, \[8, 2, 64\], got \[8, 1, 64\]"),
        ({"k": torch.zeros(8, 2, 64, dtype=torch.bfloat16)}, "k: expected torch.float32, got torch.bfloat16"),
        ({"q": torch.zeros(8, 4, 64, dtype=torch.float64)}, "q: expected float32, bfloat16 or float16"),
        ({"q": torch.zeros(8, 64, 4).transpose(1, 2)}, "q: expected a contiguous last dimension"),
        ({"cu_seqlens_q": torch.tensor([0, 8])}, "cu_seqlens_q: expected int32, got torch.int64"),
        ({"cu_seqlens_q": offsets([7])}, r"cu_seqlens_q: expected the last offset .* \(8\), got 7"),
        ({"cu_seqlens_q": offsets([8]) + 1}, "cu_seqlens_q: expected the first offset to be 0, got 1"),
        ({"cu_seqlens_q": offsets([5, -2, 5])}, "cu_seqlens_q: expected ascending offsets, got 3 after 5"),
        ({"cu_seqlens_k": offsets([4, 4])}, "cu_seqlens_k: dimension 0"),
        ({"cu_seqlens_k": offsets([9])}, "cu_seqlens_k: expected the last offset"),
        ({"cu_seqlens_q": torch.zeros(0, dtype=torch.int32)}, "cu_seqlens_q: expected"),
        ({"softcap": -1.0}, "softcap: expected a finite number >= 0, got -1.0"),
        ({"window": (-2, 0)}, r"window: expected \(left, right\), each >= -1, got \(-2, 0\)"),
    ],
)  # fmt: skip
def test_error_messages(change, message):
    arguments = {
        "q": torch.zeros(8, 4, 64),
        "k": torch.zeros(8, 2, 64),
        "v": torch.zeros(8, 2, 64),
        "cu_seqlens_q": offsets([8]),
    } | change
    with pytest.raises(ValueError, match=message):
        varlen_attention(**arguments)


def test_info_tells_what_serves_each_device():
    import fastsft

    info = fastsft.info()
    ops, on_cuda = info["ops"], "native" if info["cuda"]["built_for"] else "torch"
    for name in ("varlen_attention_fwd", "varlen_attention_bwd", "paged_attention"):
        assert ops[name]["cpu"]["kind"] == "native"
        assert ops[name]["cuda"]["kind"] == on_cuda
        assert ops[name]["cuda"]["reason"]


def test_plan_on_a_cpu_is_empty_and_changes_nothing():
    q, k, v = qkv(LENGTHS, LENGTHS, (4, 2), 64)
    plan = attention_plan(offsets(LENGTHS), total_q=sum(LENGTHS), window=(37, -1))
    assert plan.memory.numel() == 0
    with_plan = varlen_attention(q, k, v, offsets(LENGTHS), window=(37, -1), plan=plan)
    assert torch.equal(with_plan, varlen_attention(q, k, v, offsets(LENGTHS), window=(37, -1)))


@pytest.mark.parametrize(
    "other", [{"causal": False}, {"window": (3, 0)}, {"total_q": 7}, {"total_k": 9}], ids=lambda x: str(*x)
)
def test_a_plan_for_another_batch_or_mask_is_refused(other):
    q, k, v = qkv([8], [8], (2, 1), 64)
    plan = attention_plan(offsets([8]), **{"total_q": 8, **other})
    with pytest.raises(ValueError, match="plan: expected one for"):
        varlen_attention(q, k, v, offsets([8]), plan=plan)


def test_reference_plan_is_the_mask():
    lengths_q, lengths_k = [3, 0, 2], [4, 1, 0]
    rows, columns = reference.attention_plan(offsets(lengths_q), offsets(lengths_k), window=(1, 0))
    assert rows.tolist() == [[0, 2], [1, 3], [2, 4], [0, 0], [0, 0]]
    assert columns.tolist() == [[0, 1], [0, 2], [1, 3], [2, 3], [0, 0]]
