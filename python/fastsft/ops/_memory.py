"""Large tensors on huge pages, where the system gives them."""

from __future__ import annotations

import mmap
from typing import Any

import torch
from torch import Tensor

from fastsft import _C

_HUGE = 2 << 20
_CHUNK = 64 << 20
_LINE = 64


def large_empty(shape: Any, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor that will be written at once."""
    tensor = like.new_empty(shape, dtype=dtype)
    if tensor.device.type == "cpu":
        _C.advise_huge_pages(tensor)
    return tensor


class HugePages:
    """Hands out memory on huge pages where the system gives them, piece by piece.

    A tensor of its own has small pages at its ends, or throughout: its memory may have been in use before. Weights that
    a step streams from huge pages arrive a tenth to a quarter faster.
    """

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8, device="cpu")

    def empty(self, nbytes: int) -> Tensor:
        """uint8 [nbytes], aligned to 64 bytes; all that is handed out keeps the memory around it."""
        size = -(-nbytes // _LINE) * _LINE
        if size > len(self._left):
            self._left = _fresh(max(size, _CHUNK))
        piece, self._left = self._left[:nbytes], self._left[size:]
        return piece


def _fresh(nbytes: int) -> Tensor:
    """What nobody has written to begins on a huge page; only what is written takes memory."""
    memory = mmap.mmap(-1, nbytes + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    _C.advise_huge_pages(whole)
    return whole[-whole.data_ptr() % _HUGE :]
