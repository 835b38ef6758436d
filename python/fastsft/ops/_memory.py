"""Large tensors on huge pages, where the system gives them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsft import _C


def large_empty(shape: Any, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor that will be written at once."""
    tensor = like.new_empty(shape, dtype=dtype)
    if tensor.device.type == "cpu":
        _C.advise_huge_pages(tensor)
    return tensor
