"""varlen_attention against the float64 reference, and its bits: no leak, no dependence on company or threads."""

from __future__ import annotations

import pytest
import torch
from attention_cases import LENGTHS, assert_as_good_as, offsets, options_of, qkv
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsft.ops import attention, reference, varlen_attention
from fastsft.ops._attention_inputs import HEAD_DIMS
from fastsft.ops._attention_torch import torch_backward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MASKS = {
    "causal": {},
    "full": {"causal": False},
    "left window": {"window": (37, -1)},
    "narrow": {"window": (0, 0)},
    "both sides": {"causal": False, "window": (5, 70)},
    "right only": {"causal": False, "window": (-1, 3)},
}


def gradients(function, inputs, upstream):
    """(out, lse, dq, dk, dv) with the gradients of both outputs; lse = -inf has no upstream gradient."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out, lse = function(*inputs)
    dout, dlse = upstream
    dlse = torch.where(lse.isneginf(), 0, dlse).to(lse.dtype)
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), inputs, (dout.to(out.dtype), dlse))]


def check(lengths_q, lengths_k, heads, dim, dtype, **options):
    inputs = qkv(lengths_q, lengths_k, heads, dim, dtype)
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    generator = torch.Generator().manual_seed(1)
    upstream = (
        torch.randn(inputs[0].shape, generator=generator).to(dtype),
        torch.randn(heads[0], sum(lengths_q), generator=generator).to(dtype),
    )
    ours = gradients(
        lambda q, k, v: varlen_attention(q, k, v, cu_q, cu_k, return_lse=True, **options), inputs, upstream
    )
    low = gradients(lambda q, k, v: reference.varlen_attention(q, k, v, cu_q, cu_k, **options), inputs, upstream)
    exact = gradients(
        lambda q, k, v: reference.varlen_attention(q, k, v, cu_q, cu_k, **options),
        [x.double() for x in inputs],
        upstream,
    )
    assert ours[0].dtype == dtype
    assert ours[1].dtype == torch.float32
    assert torch.equal(ours[1].isneginf(), exact[1].isneginf())
    unseen = exact[1].isneginf().T
    for i in (0, 2):  # output and dq of a query that sees no key
        assert not ours[i][unseen].any()
    ours[1], low[1], exact[1] = (x.masked_fill(x.isneginf(), 0) for x in (ours[1], low[1], exact[1]))
    for name, a, b, c in zip(("out", "lse", "dq", "dk", "dv"), ours, low, exact, strict=True):
        assert_as_good_as(a, b, c, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (7, 1), (14, 2)], ids=str)
def test_matches_reference_on_every_instruction_set(isa, heads, dtype):
    check(LENGTHS, LENGTHS, heads, 64, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_float32_rounded_once(isa, dtype):
    """Same inputs, so the float32 result rounded by torch is what must come out, subnormals and overflow included."""
    if isa == "avx512bf16" and dtype == torch.bfloat16:
        pytest.skip("bfloat16 dot products take probabilities in bfloat16")
    q, k, v = qkv([257], [257], (4, 2), 64, dtype)
    size = torch.logspace(-9, 5, 257)[:, None, None]
    v = (v * size).to(dtype).clamp(-6e4, 6e4)
    v[200:203, :, :2] = torch.finfo(dtype).max
    wide = varlen_attention(q.float(), k.float(), v.float(), offsets([257]), softcap=5.0)
    assert torch.equal(varlen_attention(q, k, v, offsets([257]), softcap=5.0), wide.to(dtype))


def sdpa(q, k, v):
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1)


@pytest.mark.parametrize("tokens", [64, 257, 600])
@pytest.mark.parametrize("dim", [64, 128])
def test_bfloat16_is_as_exact_as_sdpa(isa, dim, tokens):
    inputs = qkv([tokens], [tokens], (6, 2), dim, torch.bfloat16)
    if torch._fused_sdp_choice(*(x.transpose(0, 1)[None] for x in inputs), None, 0.0, True, enable_gqa=True) == 0:
        pytest.skip(
            "this torch has no fused attention for groups of heads on a CPU, and its plain one works in float32"
        )
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).bfloat16()

    def results(function, tensors):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))

    ours = results(lambda q, k, v: varlen_attention(q, k, v, offsets([tokens])), inputs)
    theirs, exact = results(sdpa, inputs), results(sdpa, [x.double() for x in inputs])
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), ours, theirs, exact, strict=True):
        assert_as_good_as(a, b, c, name)


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dims(isa, dim, dtype):
    check([70, 3, 129], [70, 3, 129], (6, 2), dim, dtype)


@pytest.mark.parametrize("mask", MASKS)
def test_masks_with_unequal_lengths(isa, mask):
    check([1, 31, 0, 257, 64, 130, 9], [1, 40, 5, 257, 3, 200, 0], (4, 2), 32, torch.float32, **MASKS[mask])


@pytest.mark.parametrize("softcap", [0.7, 30.0])
def test_softcap(isa, softcap):
    check(LENGTHS, LENGTHS, (4, 2), 64, torch.float32, softcap=softcap, scale=0.5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_batch(data):
    count = data.draw(st.integers(1, 5))
    lengths = st.lists(st.integers(0, 140), min_size=count, max_size=count)
    heads_k, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    reach = st.integers(-1, 150)
    check(
        data.draw(lengths),
        data.draw(lengths),
        (heads_k * group, heads_k),
        data.draw(st.sampled_from([32, 80])),
        torch.float32,
        causal=data.draw(st.booleans()),
        window=data.draw(st.none() | st.tuples(reach, reach)),
        softcap=data.draw(st.sampled_from([0.0, 2.0])),
    )


@pytest.mark.parametrize("tokens", [0, 1, 31, 257])
def test_one_sequence(tokens):
    check([tokens], [tokens], (2, 1), 64, torch.float32)


def test_one_long_among_many_short():
    check([3] * 40 + [600] + [17] * 20, [3] * 40 + [600] + [17] * 20, (7, 1), 32, torch.float32)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_across_the_key_blocks_of_the_backward_pass(mask, dtype):
    check([255, 256, 257, 400, 150], [256, 256, 300, 390, 500], (3, 1), 32, dtype, **MASKS[mask])


@pytest.mark.parametrize("causal", [True, False])
def test_more_query_heads_than_a_tile_has_rows(causal):
    check([90], [90], (160, 1), 32, torch.float32, causal=causal)


def test_no_sequences():
    q, k, v = qkv([], [], (2, 1), 32)
    out, lse = varlen_attention(q, k, v, offsets([]), return_lse=True)
    assert out.shape == (0, 2, 32)
    assert lse.shape == (2, 0)
    arguments = (out, q, k, v, out, lse, None, offsets([]), offsets([]), *options_of())
    for backward in (attention._native_backward, torch_backward):
        assert [x.shape for x in backward(*arguments)] == [x.shape for x in (q, k, v)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_leak_packed_equals_each_sequence_alone_bit_for_bit(isa, dtype):
    inputs = [x.requires_grad_() for x in qkv(LENGTHS, LENGTHS, (7, 1), 64, dtype)]
    cu = offsets(LENGTHS)
    out = varlen_attention(*inputs, cu)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    packed = torch.autograd.grad(out, inputs, upstream)
    for begin, end in zip(cu.tolist(), cu.tolist()[1:], strict=False):
        alone_in = [x[begin:end].detach().clone().requires_grad_() for x in inputs]
        alone_out = varlen_attention(*alone_in, offsets([end - begin]))
        assert torch.equal(alone_out, out[begin:end])
        for ours, theirs in zip(torch.autograd.grad(alone_out, alone_in, upstream[begin:end]), packed, strict=True):
            assert torch.equal(ours, theirs[begin:end])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, (100, -1)])
def test_last_rows_have_the_same_bits_alone_or_together(isa, window, dtype):
    q, k, v = qkv([300], [300], (6, 2), 64, dtype)
    whole = varlen_attention(q, k, v, offsets([300]), window=window)
    for last in (1, 2, 7, 65, 131):
        tail = varlen_attention(q[-last:], k, v, offsets([last]), offsets([300]), window=window)
        assert torch.equal(tail, whole[-last:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_bad_values_stay_in_their_sequence(isa, poison, which, dtype):
    lengths = [20, 90, 20, 70]
    cu = offsets(lengths)
    clean = qkv(lengths, lengths, (4, 2), 64, dtype)
    dirty = [x.clone() for x in clean]
    dirty[which][50:60] = poison  # inside the second sequence
    results = []
    for inputs in (clean, dirty):
        inputs = [x.requires_grad_() for x in inputs]
        out, lse = varlen_attention(*inputs, cu, return_lse=True)
        results.append([out, lse.T, *torch.autograd.grad((out.sum() + lse.sum()), inputs)])
    assert results[1][0][20:110].isnan().any()
    for a, b in zip(*results, strict=True):
        assert torch.equal(a[:20], b[:20])
        assert torch.equal(a[110:], b[110:])


def test_a_bad_query_row_spoils_only_itself():
    q, k, v = qkv([90], [90], (4, 2), 64)
    clean = varlen_attention(q, k, v, offsets([90]))
    q[40, 1] = float("nan")
    dirty = varlen_attention(q, k, v, offsets([90]))
    assert dirty[40, 1].isnan().all()
    dirty[40, 1] = clean[40, 1]
    assert torch.equal(clean, dirty)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_every_thread_count_and_run(threads, dtype):
    lengths = [300, 5, 64, 200, 1, 500]
    inputs = [x.requires_grad_() for x in qkv(lengths, lengths, (14, 2), 64, dtype)]
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    seen = []
    for n in (1, 2, 3, 5, 5, 8):
        threads(n)
        out, lse = varlen_attention(*inputs, offsets(lengths), return_lse=True)
        seen.append([out, lse, *torch.autograd.grad(out, inputs, upstream)])
    for other in seen[1:]:
        for a, b in zip(seen[0], other, strict=True):
            assert torch.equal(a, b)


def test_gradcheck_like_finite_differences_of_lse_and_out():
    # float32 only, so a directional derivative in float64 of the reference stands in for gradcheck.
    inputs = qkv([9, 4], [9, 4], (2, 1), 32)
    cu = offsets([9, 4])
    directions = qkv([9, 4], [9, 4], (2, 1), 32, seed=5)

    def value(*tensors):
        out, lse = reference.varlen_attention(*tensors, cu)
        return (out * torch.cos(out)).sum() + lse.square().sum()

    step = 1e-6
    doubles = [x.double() for x in inputs]
    ahead, behind = (
        value(*(x + sign * step * d for x, d in zip(doubles, directions, strict=True))) for sign in (1, -1)
    )
    leaves = [x.requires_grad_() for x in inputs]
    out, lse = varlen_attention(*leaves, cu, return_lse=True)
    grads = torch.autograd.grad((out * torch.cos(out)).sum() + lse.square().sum(), leaves)
    slope = sum((g.double() * d).sum() for g, d in zip(grads, directions, strict=True))
    torch.testing.assert_close(slope, (ahead - behind) / (2 * step), rtol=1e-4, atol=1e-4)
