"""Inputs that several tests draw."""

from __future__ import annotations

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
