"""kv_write against the layout as it is specified, byte for byte; cached_attention against float64; bits of rows."""

from __future__ import annotations

import itertools

import pytest
import torch
from accuracy import assert_as_good_as_torch
from samples import randn

from fastsft import _C, ops
from fastsft.ops import reference
from fastsft.ops.kv_cache import FORMATS, KVLayout

TYPES = [
    ("float32", torch.float32),
    ("bfloat16", torch.bfloat16),
    ("int8", torch.bfloat16),
    ("int8", torch.float32),
]


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Texts:
    """Keys, values and queries of some texts, a cache of one layer, and the blocks of each text in random order."""

    def __init__(self, lengths: list[int], layout: KVLayout, dtype: torch.dtype, group: int = 1, seed: int = 0) -> None:
        self.layout, self.lengths = layout, lengths
        shape = (sum(lengths), layout.heads, layout.head_dim)
        self.q = randn(shape[0], layout.heads * group, layout.head_dim, seed=1, dtype=dtype).split(lengths)
        self.k, self.v = (randn(*shape, seed=i, dtype=dtype).split(lengths) for i in (2, 3))
        width = -(-max(lengths) // layout.block_size)
        order = torch.randperm(width * len(lengths), generator=torch.Generator().manual_seed(seed))
        self.table = order.int().view(len(lengths), width)
        self.blocks = torch.full((order.numel(), layout.block_bytes), 255, dtype=torch.uint8)  # NaN

    def rows(self, chunks: list[tuple[int, int, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Block table, offsets and contexts of a step of chunks (text, first token, end)."""
        cu = [0, *itertools.accumulate(end - begin for _, begin, end in chunks)]
        return self.table[[text for text, _, _ in chunks]], int32(cu), int32([end for _, _, end in chunks])

    def taken(self, x: tuple[torch.Tensor, ...], chunks: list[tuple[int, int, int]]) -> torch.Tensor:
        return torch.cat([x[text][begin:end] for text, begin, end in chunks])

    def write(self, chunks: list[tuple[int, int, int]]) -> None:
        ops.kv_write(
            self.blocks, self.layout, self.taken(self.k, chunks), self.taken(self.v, chunks), *self.rows(chunks)
        )

    def attend(self, chunks: list[tuple[int, int, int]], window_left: int = -1) -> torch.Tensor:
        q = self.taken(self.q, chunks)
        return ops.cached_attention(q, self.blocks, self.layout, *self.rows(chunks), window_left=window_left)

    def step(self, *chunks: tuple[int, int, int], window_left: int = -1) -> torch.Tensor:
        self.write(list(chunks))
        return self.attend(list(chunks), window_left)


# --- the layout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize(("format", "dtype"), TYPES)
def test_bytes_are_those_of_the_specification(format: str, dtype: torch.dtype, block_size: int) -> None:
    layout = KVLayout(format, heads=2, head_dim=32, block_size=block_size)
    texts = Texts([70, 5, 33], layout, dtype)
    texts.k[0][3] = 0
    texts.v[0][4] = 1e-44
    expected = texts.blocks.clone()
    for chunks in ([(0, 0, 50), (2, 0, 7)], [(1, 0, 5), (0, 50, 51), (2, 7, 7)], [(0, 51, 70)]):
        texts.write(chunks)
        arguments = texts.taken(texts.k, chunks), texts.taken(texts.v, chunks), *texts.rows(chunks)
        reference.kv_write(expected, layout, *arguments)
        assert torch.equal(texts.blocks, expected), chunks


def test_int8_errs_by_half_a_step() -> None:
    layout = KVLayout("int8", heads=3, head_dim=64, block_size=16)
    texts = Texts([64], layout, torch.float32)
    texts.write([(0, 0, 64)])
    for got, rows in zip(reference.kv_read(texts.blocks, layout), (texts.k, texts.v), strict=True):
        stored, exact = got[texts.table[0].long()].flatten(0, 1), rows[0]
        step = exact.abs().amax(-1, keepdim=True) / 127
        assert ((stored - exact).abs() <= step * 0.5001).all()
        assert 0.004 < (stored - exact).norm() / exact.norm() < 0.007


def test_a_nan_marks_its_token_and_head() -> None:
    layout = KVLayout("int8", heads=2, head_dim=16, block_size=16)
    texts = Texts([16], layout, torch.float32)
    texts.k[0][5, 1, 3], texts.v[0][7, 0, 2] = torch.inf, torch.nan
    texts.write([(0, 0, 16)])
    k, v = (x[0] for x in reference.kv_read(texts.blocks, layout))
    assert k.isnan().all(-1).nonzero().tolist() == [[5, 1]]
    assert v.isnan().all(-1).nonzero().tolist() == [[7, 0]]
    assert not k.isinf().any()


# --- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window_left", [-1, 0, 100, 300])
@pytest.mark.parametrize("group", [1, 2, 3, 7, 8])
@pytest.mark.parametrize(("format", "dtype"), TYPES)
def test_as_good_as_torch(format: str, dtype: torch.dtype, group: int, window_left: int) -> None:
    for head_dim, block_size in [(32, 16), (64, 32), (80, 16), (256, 64)]:
        layout = KVLayout(format, heads=2, head_dim=head_dim, block_size=block_size)
        texts = Texts([300, 1, 270, 17], layout, dtype, group)
        texts.write([(i, 0, n) for i, n in enumerate(texts.lengths)])
        chunks = [(0, 290, 300), (3, 17, 17), (1, 0, 1), (2, 0, 270)]
        got = texts.attend(chunks, window_left)
        q, rows = texts.taken(texts.q, chunks), texts.rows(chunks)
        exact = reference.cached_attention(q.double(), texts.blocks, layout, *rows, window_left=window_left)
        same = reference.cached_attention(q, texts.blocks, layout, *rows, window_left=window_left)
        assert_as_good_as_torch([got], [same], [exact])


def test_int8_attention_is_close_to_that_of_the_values() -> None:
    exact, quantised = (
        Texts([700], KVLayout(format, heads=2, head_dim=64, block_size=16), torch.float32, 2).step((0, 0, 700))
        for format in ("float32", "int8")
    )
    assert (quantised - exact).norm() / exact.norm() < 0.01


@pytest.mark.parametrize(("format", "dtype"), TYPES)
def test_long_contexts_in_any_division(format: str, dtype: torch.dtype) -> None:
    layout = KVLayout(format, heads=1, head_dim=64, block_size=64)
    texts = Texts([32768], layout, dtype, 3)
    texts.write([(0, 0, 32768)])
    results = []
    for threads in (1, 2, 3):
        _C.set_num_threads(threads)
        results.append(texts.attend([(0, 32767, 32768)]))
    assert all(torch.equal(results[0], other) for other in results)
    exact = reference.cached_attention(
        texts.q[0][-1:].double(), texts.blocks, layout, texts.table, int32([0, 1]), int32([32768])
    )
    assert (results[0] - exact).norm() / exact.norm() < (1e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("window_left", [-1, 40])
@pytest.mark.parametrize(("format", "dtype"), TYPES)
def test_bits_do_not_depend_on_chunks_company_and_blocks(format: str, dtype: torch.dtype, window_left: int) -> None:
    layout = KVLayout(format, heads=2, head_dim=64, block_size=16)
    lengths = [330, 40, 77]
    whole = Texts(lengths, layout, dtype, 3).step((0, 0, 330), window_left=window_left)
    for first in range(1, 18):
        texts = Texts(lengths, layout, dtype, 3, seed=first)
        texts.write([(1, 0, 40), (2, 0, 70)])
        parts, begin, rows = [], 0, first
        while begin < 330:
            end = min(330, begin + rows)
            before = [(1, 39, 40)] * (begin % 3)
            got = texts.step(*before, (0, begin, end), (2, 70, 77), window_left=window_left)
            parts.append(got[len(before) : len(before) + end - begin])
            begin, rows = end, rows % 17 + 1 + 60 * (begin % 2)
        assert torch.equal(torch.cat(parts), whole), first


def test_stale_blocks_reach_nothing() -> None:
    layout = KVLayout("bfloat16", heads=1, head_dim=32, block_size=32)
    texts = Texts([40], layout, torch.bfloat16)
    texts.write([(0, 0, 20)])
    got = texts.attend([(0, 18, 20)])
    texts.k[0][20:], texts.v[0][20:] = torch.nan, torch.nan
    texts.write([(0, 20, 40)])
    texts.write([(0, 15, 20)])
    assert torch.equal(texts.attend([(0, 18, 20)]), got)


def test_strided_rows_and_none() -> None:
    layout = KVLayout("float32", heads=2, head_dim=16, block_size=16)
    texts = Texts([20], layout, torch.float32)
    expected = texts.step((0, 0, 20))
    qkv = torch.cat([texts.q[0], texts.k[0], texts.v[0]], 1)
    q, k, v = qkv.split(2, 1)
    texts.blocks.fill_(255)
    rows = texts.rows([(0, 0, 20)])
    ops.kv_write(texts.blocks, layout, k, v, *rows)
    assert torch.equal(ops.cached_attention(q, texts.blocks, layout, *rows), expected)
    none = ops.cached_attention(q[:0], texts.blocks, layout, texts.table, int32([0, 0]), int32([0]))
    assert none.shape == (0, 2, 16)


# --- the contract -----------------------------------------------------------------------------------------------------


def test_opcheck() -> None:
    layout = KVLayout("bfloat16", heads=2, head_dim=32, block_size=16)
    texts = Texts([20], layout, torch.bfloat16, 2)
    rows = texts.rows([(0, 0, 20)])
    texts.write([(0, 0, 20)])
    names = torch.ops.fastsft
    torch.library.opcheck(
        names.kv_write.default, (texts.blocks, layout.format, 16, texts.k[0], texts.v[0], *rows)
    )  # fmt: skip
    torch.library.opcheck(
        names.cached_attention.default, (texts.q[0], texts.blocks, layout.format, 2, 16, *rows, -1, 0.25)
    )


@pytest.mark.parametrize(
    ("format", "heads", "head_dim", "block_size", "message"),
    [
        ("float16", 1, 64, 16, "format: expected float32, bfloat16 or int8"),
        ("int8", 0, 64, 16, "heads: expected >= 1"),
        ("int8", 1, 40, 16, "head_dim: expected a multiple of 16 up to 256"),
        ("int8", 1, 272, 16, "head_dim"),
        ("int8", 1, 64, 8, "block_size: expected a multiple of 16"),
    ],
)
def test_errors_of_a_layout(format: str, heads: int, head_dim: int, block_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVLayout(format, heads, head_dim, block_size)


def test_errors_of_a_step() -> None:
    layout = KVLayout("bfloat16", heads=2, head_dim=32, block_size=16)
    texts = Texts([20], layout, torch.bfloat16, 2)
    rows = texts.rows([(0, 0, 20)])
    q, k, v = texts.q[0], texts.k[0], texts.v[0]
    with pytest.raises(ValueError, match="k: expected bfloat16"):
        ops.kv_write(texts.blocks, layout, k.float(), v.float(), *rows)
    with pytest.raises(ValueError, match=r"k: expected \[T, 2, 32\]"):
        ops.kv_write(texts.blocks, layout, k[:, :1], v[:, :1], *rows)
    with pytest.raises(ValueError, match="q: expected bfloat16"):
        ops.cached_attention(q.float(), texts.blocks, layout, *rows)
    with pytest.raises(ValueError, match="q: expected a multiple of 2 heads"):
        ops.cached_attention(q[:, :3].contiguous(), texts.blocks, layout, *rows)
    with pytest.raises(ValueError, match="blocks"):
        ops.cached_attention(q, texts.blocks[:, :-1].contiguous(), layout, *rows)
    with pytest.raises(ValueError, match="window_left: expected >= -1"):
        ops.cached_attention(q, texts.blocks, layout, *rows, window_left=-2)
    table, cu, lens = rows
    for bad, message in [
        ((table + 2, cu, lens), "block_table: expected blocks from 0 to 1"),
        ((table, cu, lens + 13), "block_table: expected 3 blocks"),
        ((table, cu, lens - 1), "context_lens: expected at least"),
        ((table, cu + 1, lens), "cu_seqlens"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.cached_attention(q, texts.blocks, layout, *bad)


def test_every_format_has_its_bytes() -> None:
    sizes = {format: KVLayout(format, heads=3, head_dim=64, block_size=32).block_bytes for format in FORMATS}
    token = 2 * 3 * 64 * 32
    assert sizes == {"float32": 4 * token, "bfloat16": 2 * token, "int8": token + 2 * 3 * 32 * 4}
