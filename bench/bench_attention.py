"""Packed and paged attention against what plain torch offers, on the same inputs in the same process.

Rivals: ``sdpa each`` (scaled_dot_product_attention one sequence at a time), ``sdpa padded`` (padded to the longest, the
copies in and out included) and ``sdpa mask`` (one call with a dense block-diagonal mask). Every contestant passes a
correctness gate before it is timed. ``extra_info`` holds the rate in GFLOP/s of visible work and its share of a large
product's; for decoding, whose limit is memory, the rate at which the cache is read, and its share of that of summing a
large array (reading only, as decoding does, but front to back).
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from shapes import LLAMA_8B, MIXES_2K, QWEN_05B, Heads, Mix

from fastsft import _C
from fastsft.ops import paged_attention, varlen_attention

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def sdpa(q, k, v, **options):
    """[B, T, H, D] in and out."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options).transpose(1, 2)


def fastsft_packed(mix: Mix):
    cu_seqlens = mix.cu_seqlens
    return lambda q, k, v: varlen_attention(q, k, v, cu_seqlens)


def sdpa_each(mix: Mix):
    def run(q, k, v):
        parts = zip(*(x.split(mix.lengths) for x in (q, k, v)), strict=True)
        return torch.cat([sdpa(*(x[None] for x in part), is_causal=True)[0] for part in parts])

    return run


def sdpa_padded(mix: Mix):
    longest = max(mix.lengths)
    rows = torch.cat([torch.arange(n) + i * longest for i, n in enumerate(mix.lengths)])

    def pad(x):
        padded = x.new_zeros(len(mix.lengths) * longest, *x.shape[1:]).index_copy(0, rows, x)
        return padded.unflatten(0, (-1, longest))

    return lambda q, k, v: sdpa(pad(q), pad(k), pad(v), is_causal=True).flatten(0, 1).index_select(0, rows)


def sdpa_mask(mix: Mix):
    owner = torch.repeat_interleave(torch.arange(len(mix.lengths)), torch.tensor(mix.lengths))
    mask = (owner[:, None] == owner[None, :]).tril()
    return lambda q, k, v: sdpa(q[None], k[None], v[None], attn_mask=mask)[0]


CONTESTANTS = {
    "fastsft": fastsft_packed,
    "sdpa each": sdpa_each,
    "sdpa padded": sdpa_padded,
    "sdpa mask": sdpa_mask,
}


def inputs(mix: Mix, heads: Heads, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(mix.tokens, n, heads.dim, generator=generator).to(dtype)
        for n in (heads.query, heads.key, heads.key, heads.query)
    ]


def gradients(function, q, k, v, upstream):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    return out, *torch.autograd.grad(out, leaves, upstream)


def gate(results, expected, low) -> None:
    """Each result's error is at most twice (and a little) that of per-sequence SDPA in the same dtype."""
    for ours, exact, other in zip(results, expected, low, strict=True):
        slack = 1e-5 * exact.norm()
        assert (ours.double() - exact).norm() <= 2 * (other.double() - exact).norm() + slack


@pytest.fixture(scope="module", autouse=True)
def equal_threads():
    torch.set_num_threads(_C.num_threads())


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("mix", MIXES_2K, ids=lambda mix: mix.name)
def test_packed(benchmark, limits, mix, mode, dtype, contestant):
    benchmark.group = f"varlen_attention {QWEN_05B.name} {mix.name} {dtype} {mode}"
    q, k, v, upstream = inputs(mix, QWEN_05B, DTYPES[dtype])
    function = CONTESTANTS[contestant](mix)
    if contestant != "sdpa each":
        reference = sdpa_each(mix)
        exact = gradients(reference, *(x.double() for x in (q, k, v, upstream)))
        gate(gradients(function, q, k, v, upstream), exact, gradients(reference, q, k, v, upstream))
    if mode == "forward":
        benchmark(function, q, k, v)
    else:
        benchmark(gradients, function, q, k, v, upstream)
    products = 2 if mode == "forward" else 7
    flops = products * 2 * mix.causal_pairs * QWEN_05B.query * QWEN_05B.dim
    if benchmark.stats:  # absent with --benchmark-disable
        benchmark.extra_info["GFLOP/s"] = round(flops / benchmark.stats["median"] / 1e9, 1)
    limits.share_flops(benchmark, flops, DTYPES[dtype])


def gathered_sdpa(q, k_cache, v_cache, table, cu_seqlens, context_lens):
    """Decode for contexts of equal length, the kindest case for a gather: one batched call."""
    length = int(context_lens[0])
    k, v = (cache[table.long()].flatten(1, 2)[:, :length] for cache in (k_cache, v_cache))
    return sdpa(q[:, None], k, v)[:, 0]


# A decoder's layers take turns, so that a call finds none of its keys and values in a processor's cache.
COLD_BYTES = 96 * 2**20


@pytest.mark.parametrize("contestant", ["fastsft", "gather + sdpa"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [QWEN_05B, LLAMA_8B], ids=lambda heads: heads.name)
@pytest.mark.parametrize(("sequences", "context"), [(1, 1024), (16, 512), (64, 512), (8, 4096), (1, 32768)])
def test_decode(benchmark, limits, sequences, context, heads, dtype, contestant):
    benchmark.group = f"paged_attention {heads.name} decode {sequences}x{context} {dtype}"
    block_size, element = 16, DTYPES[dtype]
    read = 2 * sequences * context * heads.key * heads.dim * element.itemsize
    layers = -(-COLD_BYTES // read)
    blocks = sequences * context // block_size
    generator = torch.Generator().manual_seed(0)
    k_cache, v_cache = (
        torch.randn(layers * blocks, block_size, heads.key, heads.dim, generator=generator).to(element)
        for _ in range(2)
    )
    q = torch.randn(sequences, heads.query, heads.dim, generator=generator).to(element)
    tables = torch.randperm(layers * blocks, generator=generator).int().view(layers, sequences, -1)
    rest = (uniform_offsets(sequences), torch.full((sequences,), context).int())
    function = paged_attention if contestant == "fastsft" else gathered_sdpa
    exact = gathered_sdpa(q.double(), k_cache.double(), v_cache.double(), tables[0], *rest)
    gate(
        [function(q, k_cache, v_cache, tables[0], *rest)],
        [exact],
        [gathered_sdpa(q, k_cache, v_cache, tables[0], *rest)],
    )
    turn = itertools.cycle(tables)
    benchmark(lambda: function(q, k_cache, v_cache, next(turn), *rest))
    if benchmark.stats:
        benchmark.extra_info["cache GB/s"] = round(read / benchmark.stats["median"] / 1e9, 2)
    limits.share_bytes(benchmark, read=read)


def uniform_offsets(sequences: int) -> torch.Tensor:
    return torch.arange(sequences + 1, dtype=torch.int32)
