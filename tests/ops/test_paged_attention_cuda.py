"""Paged attention on a GPU: the CPU's cases against the same reference, a row's own bits, replay in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from attention_cases import assert_as_good_as, offsets
from test_paged_attention import CONTEXTS, QUERIES, paged_case

from fastsft.ops import paged_attention, reference

pytestmark = pytest.mark.gpu

OPTIONS = [{}, {"causal": False}, {"window": (20, -1)}, {"window": (300, -1)}, {"softcap": 2.0, "scale": 0.3}]


def on_gpu(case):
    return tuple(x.cuda() for x in case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("heads", "block_size"), [((4, 4), 16), ((14, 2), 24), ((34, 2), 1)], ids=str)
def test_matches_reference(dtype, dim, heads, block_size):
    case = paged_case(QUERIES, CONTEXTS, heads, dim, dtype, block_size)
    exact = reference.paged_attention(*(x.double() for x in case[:3]), *case[3:])
    assert_as_good_as(paged_attention(*on_gpu(case)).cpu(), reference.paged_attention(*case), exact)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options):
    case = paged_case(QUERIES, CONTEXTS, (6, 2), 64, torch.float16)
    exact = reference.paged_attention(*(x.double() for x in case[:3]), *case[3:], **options)
    ours = paged_attention(*on_gpu(case), **options).cpu()
    assert_as_good_as(ours, reference.paged_attention(*case, **options), exact)


@pytest.mark.parametrize("window", [None, (300, -1)], ids=str)
def test_bits_of_a_row_are_its_own(window):
    q, k, v, table, cu, lens = on_gpu(paged_case(QUERIES, CONTEXTS, (6, 2), 128, torch.bfloat16))
    together = paged_attention(q, k, v, table, cu, lens, window=window)
    row = 0
    for b, (queries, context) in enumerate(zip(QUERIES, CONTEXTS, strict=True)):
        for i in range(queries):
            one, length = offsets([1]).cuda(), torch.tensor([context - queries + i + 1], dtype=torch.int32).cuda()
            for wide in (table[b : b + 1], torch.nn.functional.pad(table[b : b + 1], (0, 3_000_000), value=-1)):
                alone = paged_attention(q[row : row + 1], k, v, wide, one, length, window=window)
                assert torch.equal(alone[0], together[row])
            row += 1


def test_graph_replay():
    """Captured once, replayed with other lengths and tables."""
    case = on_gpu(paged_case([1] * 8, [700] * 8, (8, 2), 128, torch.bfloat16))
    paged_attention(*case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(*case)
    for lengths in ([1, 700, 256, 257, 16, 3, 512, 699], [700] * 8):
        case[5].copy_(torch.tensor(lengths))
        case[3].copy_(case[3].flip(0))
        graph.replay()
        assert torch.equal(out, paged_attention(*case))


def test_bad_block_ids_give_nan():
    case = on_gpu(paged_case([1, 1], [40, 40], (4, 2), 64, torch.bfloat16))
    good = paged_attention(*case)
    case[3][0, 1] = 10**9
    out = paged_attention(*case)
    assert out[0].isnan().all()
    assert torch.equal(out[1], good[1])
