"""Digests of texts."""

from __future__ import annotations

from collections.abc import Sequence

_START = (0x243F6A8885A308D3, 0x13198A2E03707344)
_FIRST = (0xA4093822299F31D0, 0x082EFA98EC4E6C89)
_SECOND = (0x452821E638D01377, 0xBE5466CF34E90C6C)
_WORD = 2**64 - 1


def text_digests(texts: Sequence[str]) -> list[list[int]]:
    """The two 64-bit hashes of each text's UTF-8."""
    return [[_hash(text.encode(), k) for k in range(2)] for text in texts]


def _fold(x: int, y: int) -> int:
    product = x * y
    return (product & _WORD) ^ (product >> 64)


def _hash(data: bytes, k: int) -> int:
    h = (_START[k] + len(data) * 0x9E3779B97F4A7C15) & _WORD
    for at in range(0, len(data), 16):
        block = data[at : at + 16].ljust(16, b"\0")
        lo, hi = int.from_bytes(block[:8], "little"), int.from_bytes(block[8:], "little")
        h = (_fold(h ^ lo ^ _FIRST[k], ((h + hi) & _WORD) ^ _SECOND[k]) + lo) & _WORD
    return _fold(h ^ _FIRST[k], _SECOND[k] ^ len(data))
