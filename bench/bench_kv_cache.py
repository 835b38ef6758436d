"""cached_attention against paged_attention (decoding) and varlen_attention (prefill), on the same values.

Decoding goes through 160 MB of cache in one call, so that every block comes from memory; ``share_of_stream`` is the
bytes of keys and values per second by the rate at which torch sums a large array. A prefill's keys
are in the cache already; ``GFLOP/s`` counts the visible half.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from shapes import LLAMA_8B, QWEN_05B, Heads

from fastsft import ops
from fastsft.ops import reference
from fastsft.ops.kv_cache import KVLayout, empty_blocks

SMALL = Heads("30M", 9, 3, 64)
SHAPES = [SMALL, QWEN_05B, LLAMA_8B]
BLOCK, STREAM = 32, 160 << 20
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}
CONTESTANTS = [
    *[("fastsft cached_attention", format) for format in TYPES],
    *[("fastsft paged_attention", format) for format in ("float32", "bfloat16")],
]


def int32(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Case:
    """Sequences of equal length whose blocks stand in random order."""

    def __init__(self, heads: Heads, format: str, sequences: int, context: int, rows: int) -> None:
        self.layout = KVLayout(format, heads.key, heads.dim, BLOCK)
        generator = torch.Generator().manual_seed(0)
        dtype = TYPES[format]
        self.q = torch.randn(sequences * rows, heads.query, heads.dim, generator=generator).to(dtype)
        blocks = sequences * context // BLOCK
        # Values repeat: drawing 160 MB of them would take longer than the bench.
        k, v = (torch.randn(context, heads.key, heads.dim, generator=generator).to(dtype) for _ in range(2))
        self.k, self.v = k, v
        self.table = torch.randperm(blocks, generator=generator).int().view(sequences, -1)
        self.cu = int32(range(0, (sequences + 1) * rows, rows))
        self.lens = int32([context] * sequences)
        self.cache = empty_blocks(1, blocks, self.layout.block_bytes)[0]
        for table in self.table:
            ops.kv_write(self.cache, self.layout, k, v, table[None], int32([0, context]), int32([context]))

    def cached(self) -> torch.Tensor:
        return ops.cached_attention(self.q, self.cache, self.layout, self.table, self.cu, self.lens)

    def paged(self) -> Callable[[], torch.Tensor]:
        caches = [
            torch.empty(self.table.numel(), BLOCK, self.layout.heads, self.layout.head_dim, dtype=self.k.dtype)
            for _ in range(2)
        ]
        for table in self.table:
            for cache, rows in zip(caches, (self.k, self.v), strict=True):
                cache[table.long()] = rows.unflatten(0, (-1, BLOCK))
        return lambda: ops.paged_attention(self.q, *caches, self.table, self.cu, self.lens)

    def contestant(self, name: str) -> Callable[[], torch.Tensor]:
        if name == "fastsft cached_attention":
            return self.cached
        if name == "fastsft paged_attention":
            return self.paged()
        return lambda: ops.varlen_attention(self.q, self.k, self.v, self.cu)

    def gate(self, function: Callable[[], torch.Tensor]) -> None:
        """The last row of the first sequence, against float64 of the values that are stored."""
        row = int(self.cu[1]) - 1
        k, v = (x.double() for x in reference.kv_read(self.cache[self.table[0].long()], self.layout))
        k, v = (x.flatten(0, 1).repeat_interleave(self.q.shape[1] // x.shape[2], 1) for x in (k, v))
        scores = torch.einsum("hd,khd->hk", self.q[row].double(), k) * self.layout.head_dim**-0.5
        exact = torch.einsum("hk,khd->hd", scores.softmax(-1), v)
        error = (function()[row] - exact).norm() / exact.norm()
        assert error <= (1e-5 if self.q.dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(("contestant", "format"), CONTESTANTS)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("context", [1024, 32768])
@pytest.mark.parametrize("heads", SHAPES, ids=lambda heads: heads.name)
def test_decode(benchmark, limits, heads, context, rows, contestant, format, threads):
    layout = KVLayout(format, heads.key, heads.dim, BLOCK)
    sequences = -(-STREAM // (context // BLOCK * layout.block_bytes))
    case = Case(heads, format, sequences, context, rows)
    function = case.contestant(contestant)
    case.gate(function)
    benchmark.group = f"decode {heads.name} {format}, context {context}, {rows} rows each, threads: {threads}"
    benchmark.pedantic(function, rounds=11, warmup_rounds=1)
    read = case.table.numel() * layout.block_bytes
    if benchmark.stats:
        benchmark.extra_info["gigabytes_per_second"] = read / benchmark.stats["median"] / 1e9
    limits.share_bytes(benchmark, read=read)


@pytest.mark.parametrize(
    ("contestant", "format"),
    [("fastsft varlen_attention", "float32"), ("fastsft varlen_attention", "bfloat16"), *CONTESTANTS],
)
@pytest.mark.parametrize("tokens", [512, 2048])
@pytest.mark.parametrize("heads", SHAPES, ids=lambda heads: heads.name)
def test_prefill(benchmark, limits, heads, tokens, contestant, format, threads):
    case = Case(heads, format, 1, tokens, tokens)
    function = case.contestant(contestant)
    case.gate(function)
    benchmark.group = f"prefill {heads.name} of {tokens} tokens in {case.q.dtype}, threads: {threads}"
    benchmark.pedantic(function, rounds=11, warmup_rounds=1)
    flops = 2 * tokens * (tokens + 1) * heads.query * heads.dim
    limits.share_flops(benchmark, flops, case.q.dtype)
    if benchmark.stats:
        benchmark.extra_info["GFLOP/s"] = flops / benchmark.stats["median"] / 1e9
