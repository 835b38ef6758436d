"""Inputs and the tolerance rule shared by the attention tests."""

from __future__ import annotations

import itertools

import torch

LENGTHS = [1, 31, 0, 257, 64, 5, 130, 1, 63]


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def qkv(lengths_q, lengths_k, heads, dim, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    heads_q, heads_k = heads
    return tuple(
        torch.randn(sum(n), h, dim, generator=generator).to(dtype)
        for n, h in ((lengths_q, heads_q), (lengths_k, heads_k), (lengths_k, heads_k))
    )


def options_of(**changes):
    """What follows the tensors in the schema of the forward and the backward pass."""
    options = {"plan": None, "causal": True, "scale": 0.125, "window_left": -1, "window_right": -1, "softcap": 0.0}
    return tuple((options | changes).values())


def assert_as_good_as(ours: torch.Tensor, low: torch.Tensor, exact: torch.Tensor, what: str = "") -> None:
    """Our error is at most twice that of the same formula in torch at the same precision, in norm and at its largest.

    On top comes a slack of four float32 roundings at the size of the result: the largest error of a few thousand
    elements is itself a matter of luck.
    """
    assert ours.shape == exact.shape, what
    our_error, low_error = ours.double() - exact, low.double() - exact
    assert not our_error.isnan().any(), what
    for measure in (torch.linalg.vector_norm, lambda x: x.abs().amax() if x.numel() else x.sum()):
        limit = 2 * measure(low_error) + 4 * torch.finfo(torch.float32).eps * measure(exact)
        assert measure(our_error) <= limit, f"{what}: {measure(our_error):.3e} > {limit:.3e}"
