"""How close is close enough."""

from __future__ import annotations

from typing import Any

import torch


def assert_as_good_as_torch(got: Any, torch_same: Any, exact: Any) -> None:
    """The rule of docs/numerics.md: at most twice torch's own error, in norm and elementwise."""
    for ours_, theirs, ref in zip(got, torch_same, exact, strict=True):
        if ref.numel() == 0:
            assert ours_.shape == ref.shape
            continue
        unit = torch.finfo(ours_.dtype).eps * (1 + ref.abs().max())
        error, allowed = (ours_.double() - ref).abs(), (theirs.double() - ref).abs()
        assert error.max() <= 2 * allowed.max() + 4 * unit
        assert error.norm() <= 2 * allowed.norm() + 4 * unit * ref.numel() ** 0.5
