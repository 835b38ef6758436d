"""Where packed weights lie: side by side in memory that is advised to be on huge pages."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from packed_cases import model_of

from fastsft.models.packed import pack_decoder
from fastsft.ops._memory import HugePages

HUGE = 2 << 20
SMAPS = Path("/proc/self/smaps")


def advised() -> list[range]:
    """The addresses that the kernel was told to keep on huge pages."""
    found, here = [], range(0)
    for line in SMAPS.read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            here = range(*(int(end, 16) for end in first.split("-")))
        elif first == "VmFlags:" and "hg" in rest:
            found.append(here)
    return found


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists() or not SMAPS.exists(), reason="no huge pages here"
)
@pytest.mark.parametrize("format", ["bfloat16", "w8a8", "int4"])
def test_weights_lie_side_by_side_on_huge_pages(format: str) -> None:
    weights = pack_decoder(model_of("llama"), format).weights
    packed = [w for layer in weights.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down)] + [weights.head]
    pieces = sorted((t.data_ptr(), t.nbytes) for w in packed for t in (w.data, w.scales) if t.nbytes)
    areas = advised()
    assert all(any(at in area and at + size - 1 in area for area in areas) for at, size in pieces)
    assert pieces[0][0] % HUGE == 0
    for (at, size), (next_, _) in itertools.pairwise(pieces):
        assert at + size <= next_ < at + size + 64


def test_pieces_of_any_size() -> None:
    memory = HugePages()
    sizes = [1, 64, 65, 0, 63 << 20, 3 << 20, 200 << 20, 7]
    pieces = [memory.empty(size) for size in sizes]
    for i, piece in enumerate(pieces):
        assert piece.shape == (sizes[i],)
        assert piece.data_ptr() % 64 == 0
        piece[:99].fill_(i)
        piece[-99:].fill_(i)
    for i, piece in enumerate(pieces):
        assert torch.equal(piece[:99].unique(), torch.tensor([i] * bool(len(piece)), dtype=torch.uint8))
        assert torch.equal(piece[-99:].unique(), torch.tensor([i] * bool(len(piece)), dtype=torch.uint8))
