"""Inputs that several tests draw."""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt
import torch


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def noisy_copies(rng: np.random.Generator, families: int, copies: int, num_perm: int) -> npt.NDArray[np.uint32]:
    """Signatures of families that agree more or less, in random order: uint32 [families * copies, num_perm]."""
    base = rng.integers(0, 2**32, (families, 1, num_perm), np.uint32)
    noise = rng.integers(0, 2**32, (families, copies, num_perm), np.uint32)
    flip = rng.random((families, copies, num_perm)) < rng.random((families, copies, 1)) * 0.4
    rows = np.where(flip, noise, base).reshape(-1, num_perm)
    return rows[rng.permutation(len(rows))]


def family_texts(seed: int, families: int = 12, copies: int = 5, length: int = 60) -> list[str]:
    """Copies of random texts with words replaced at assorted rates, with exact and trivial duplicates among them."""
    rng = random.Random(seed)
    texts = ["", " ;\n", "one two"]
    for _ in range(families):
        base = [f"w{rng.randrange(3000)}" for _ in range(rng.randrange(5, length))]
        texts.append(" ".join(base))
        for _ in range(copies):
            rate = rng.random() * 0.12
            texts.append("\n".join(f"v{rng.randrange(3000)}" if rng.random() < rate else w for w in base))
        texts.append(" ".join(base).upper())
        texts.append(" ".join(base) + " é 日本 " + base[0])
    rng.shuffle(texts)
    return texts


def mutants(count: int, seed: int) -> list[tuple[str, str]]:
    """Pairs of texts of assorted similarity: words replaced at a rate that varies from pair to pair."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(count):
        words = [f"w{rng.randrange(5000)}" for _ in range(rng.randrange(40, 200))]
        rate = rng.random() * 0.15
        other = [f"w{rng.randrange(5000)}" if rng.random() < rate else w for w in words]
        pairs.append((" ".join(words), "\n".join(other)))
    return pairs
