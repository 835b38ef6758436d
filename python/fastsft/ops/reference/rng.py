"""Random numbers by counter."""

from __future__ import annotations


def philox(seed: int, stream: int, index: int) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al., SC 2011): key = seed, counter = (index, stream), low words first."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = index & low, index >> 32 & low, stream & low, stream >> 32 & low
    k0, k1 = seed & low, seed >> 32 & low
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & low, (p0 >> 32) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3
