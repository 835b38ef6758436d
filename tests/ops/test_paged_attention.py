"""paged_attention against the float64 reference, and its independence from what else is in the call."""

from __future__ import annotations

import pytest
import torch
from attention_cases import assert_as_good_as, offsets

from fastsft import _C
from fastsft.ops import paged_attention, reference, varlen_attention
from fastsft.ops.attention_paged import _native_paged, _torch_paged

QUERIES = [1, 1, 40, 5, 0, 1, 130]
CONTEXTS = [1, 257, 40, 77, 12, 64, 200]


def paged_case(queries, contexts, heads, dim, dtype=torch.float32, block_size=16, seed=0):
    """q, caches, table, cu_seqlens_q, context_lens; the blocks are shuffled and unused slots hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    heads_q, heads_k = heads
    needed = [-(-n // block_size) for n in contexts]
    blocks = torch.randperm(sum(needed) + 3, generator=generator)
    caches = [torch.full((len(blocks), block_size, heads_k, dim), float("nan"), dtype=dtype) for _ in range(2)]
    table = torch.full((len(contexts), max(needed) + 2), -7, dtype=torch.int32)  # unused entries may hold anything
    used = 0
    for b, (count, context) in enumerate(zip(needed, contexts, strict=True)):
        table[b, :count] = blocks[used : used + count]
        used += count
        for cache in caches:
            for j in range(context):
                values = torch.randn(heads_k, dim, generator=generator)
                cache[table[b, j // block_size], j % block_size] = values.to(dtype)
    q = torch.randn(sum(queries), heads_q, dim, generator=generator).to(dtype)
    return q, *caches, table, offsets(queries), torch.tensor(contexts, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (14, 2)], ids=str)
@pytest.mark.parametrize("block_size", [1, 16, 24, 256])
def test_matches_reference(dtype, heads, block_size):
    case = paged_case(QUERIES, CONTEXTS, heads, 64, dtype, block_size)
    low = reference.paged_attention(*case)
    exact = reference.paged_attention(*(x.double() for x in case[:3]), *case[3:])
    assert_as_good_as(paged_attention(*case), low, exact)


@pytest.mark.parametrize("options", [{"causal": False}, {"window": (20, -1)}, {"softcap": 2.0, "scale": 0.3}])
def test_options(options, isa):
    case = paged_case(QUERIES, CONTEXTS, (6, 2), 80)
    ours = paged_attention(*case, **options)
    exact = reference.paged_attention(*(x.double() for x in case[:3]), *case[3:], **options)
    assert_as_good_as(ours, reference.paged_attention(*case, **options), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (14, 2), (3, 1)], ids=str)
def test_a_row_has_the_same_bits_alone_or_in_any_company(dtype, heads, isa):
    q, k, v, table, cu, contexts = paged_case(QUERIES, CONTEXTS, heads, 64, dtype)
    together = paged_attention(q, k, v, table, cu, contexts)
    for b, (begin, end) in enumerate(zip(cu.tolist(), cu.tolist()[1:], strict=False)):
        for row in {begin, end - 1, (begin + end) // 2} if end > begin else ():
            context = contexts[b : b + 1] - (end - 1 - row)  # as if this were the newest token
            alone = paged_attention(q[row : row + 1], k, v, table[b : b + 1], offsets([1]), context)
            assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_contexts_are_shared_out_without_a_trace(dtype, isa):
    """Keys are shared out among threads, heads among items, and neither may show in the bits."""
    queries, contexts = [1, 3, 40, 1, 8], [2100, 1024, 1100, 513, 600]
    q, k, v, table, cu, lens = case = paged_case(queries, contexts, (6, 3), 64, dtype)
    low = reference.paged_attention(*case)
    exact = reference.paged_attention(*(x.double() for x in case[:3]), *case[3:])
    for options in ({}, {"window": (700, -1)}):
        results = []
        for count in (1, 3, 64):
            _C.set_num_threads(count)
            results.append(paged_attention(*case, **options))
        assert all(torch.equal(result, results[0]) for result in results)
        if not options:
            assert_as_good_as(results[0], low, exact)
        for b, (begin, end) in enumerate(zip(cu.tolist(), cu.tolist()[1:], strict=False)):
            for row in {begin, end - 1}:
                context = lens[b : b + 1] - (end - 1 - row)
                alone = paged_attention(q[row : row + 1], k, v, table[b : b + 1], offsets([1]), context, **options)
                assert torch.equal(alone[0], results[0][row])


@pytest.mark.parametrize("options", [{}, {"window": (70, -1), "softcap": 3.0}], ids=["plain", "window and softcap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_decoding_and_verification_have_the_bits_of_prefill(isa, dtype, options):
    """Few queries on many keys go through a kernel of their own; rounding must not tell."""
    for dim, heads in [(32, (7, 1)), (64, (14, 2)), (80, (5, 5)), (96, (6, 3)), (128, (8, 1)), (256, (3, 1))]:
        contexts = [130, 577]
        q, k, v, table, cu, lens = paged_case(contexts, contexts, heads, dim, dtype, block_size=24)
        prefill = paged_attention(q, k, v, table, cu, lens, **options)
        for count in (1, 3, 8, 16):
            rows = torch.cat([torch.arange(end - count, end) for end in cu[1:].tolist()])
            few = paged_attention(q[rows], k, v, table, offsets([count] * 2), lens, **options)
            assert torch.equal(few, prefill[rows]), (dim, heads, count)


def test_an_infinite_value_is_the_last_of_an_odd_number(isa):
    """Where values are multiplied in pairs, the last one's partner counts as zero and not as anything times zero."""
    q, k, v, table, cu, lens = paged_case([1], [77], (7, 1), 64, torch.bfloat16)
    v[table[0, 76 // 16], 76 % 16] = float("inf")
    assert (paged_attention(q, k, v, table, cu, lens) == float("inf")).all()


def test_same_bits_as_varlen_attention():
    contexts = [40, 129, 1100]
    q, k_cache, v_cache, table, cu, lens = paged_case(contexts, contexts, (6, 2), 64)
    k, v = (
        torch.cat([cache[table[b, : -(-n // 16)].long()].flatten(0, 1)[:n] for b, n in enumerate(contexts)])
        for cache in (k_cache, v_cache)
    )
    assert torch.equal(paged_attention(q, k_cache, v_cache, table, cu, lens), varlen_attention(q, k, v, cu))


def test_caches_may_be_strided_views():
    q, k, v, table, cu, lens = paged_case(QUERIES, CONTEXTS, (4, 2), 64)
    both = torch.stack([k, v], dim=1)  # [blocks, 2, slots, heads, D], the layout of a joint cache
    assert torch.equal(
        paged_attention(q, both[:, 0], both[:, 1], table, cu, lens), paged_attention(q, k, v, table, cu, lens)
    )
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]  # [blocks, heads, slots, head size]
    assert torch.equal(paged_attention(q, *by_head, table, cu, lens), paged_attention(q, k, v, table, cu, lens))


def test_no_queries():
    q, k, v, table, _, lens = paged_case([0, 0], [3, 20], (2, 1), 32)
    assert paged_attention(q, k, v, table, offsets([0, 0]), lens).shape == (0, 2, 32)
    assert paged_attention(q, k, v, table[:0], offsets([]), lens[:0]).shape == (0, 2, 32)


def test_plain_torch_implementation_agrees():
    case = paged_case(QUERIES, CONTEXTS, (4, 2), 64)
    options = (True, 0.125, 30, -1, 0.0)
    torch.testing.assert_close(_torch_paged(*case, *options), _native_paged(*case, *options))


def test_opcheck_and_compile():
    case = paged_case(QUERIES, CONTEXTS, (4, 2), 64)
    torch.library.opcheck(
        torch.ops.fastsft.paged_attention,
        (*case, True, 0.125, -1, -1, 0.0),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
    compiled = torch.compile(lambda *xs: paged_attention(*xs) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*case), paged_attention(*case) * 2)


def changed(index, value):
    case = list(paged_case([2, 1], [5, 17], (4, 2), 64))
    case[index] = value(case[index]) if callable(value) else value
    return case


def with_entry(row, column, value):
    def change(table):
        table[row, column] = value
        return table

    return change


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (changed(3, with_entry(1, 1, 99)), r"block_table\[1, 1\]: expected a block id in \[0, 6\), got 99"),
        (changed(3, with_entry(0, 0, -1)), r"block_table\[0, 0\]: expected a block id in \[0, 6\), got -1"),
        (changed(5, lambda lens: lens - 4), r"context_lens\[0\]: expected between .* 2 queries .*, got 1"),
        (changed(5, lambda lens: lens + 82), r"context_lens\[0\]: expected .* 64 keys, got 87"),
        (changed(5, torch.tensor([5, 17])), "context_lens: expected int32"),
        (changed(4, offsets([2, 2])), "cu_seqlens_q: expected the last offset"),
        (changed(3, lambda table: table[:1]), "block_table: dimension 0"),
        (changed(2, lambda cache: cache[:-1]), "v_cache: expected the shape of k_cache"),
    ],
)  # fmt: skip
def test_error_messages(case, message):
    with pytest.raises(ValueError, match=message):
        paged_attention(*case)
