"""The tensor view: what it accepts, how it describes tensors, and the older-torch path without the exchange API."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastsft import _C


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (torch.zeros(3, 4), "float32[3, 4] on cpu"),
        (torch.zeros(2, dtype=torch.bfloat16, requires_grad=True), "bfloat16[2] on cpu"),
        (torch.zeros((), dtype=torch.int64), "int64[] on cpu"),
        (torch.zeros(5, dtype=torch.bool), "bool[5] on cpu"),
        (torch.zeros(0, 7, dtype=torch.uint8), "uint8[0, 7] on cpu"),
        (np.zeros((2, 3), np.uint32), "uint32[2, 3] on cpu"),
        (np.zeros(4, np.float64), "float64[4] on cpu"),
    ],
)
def test_describe(tensor: object, text: str) -> None:
    assert _C.describe(tensor) == text


def test_tensors_without_exchange_api() -> None:
    class Older:
        """The attributes torch 2.6 to 2.9 offer."""

        def __init__(self, tensor: torch.Tensor) -> None:
            self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
            self.data_ptr, self.stride, self.element_size = tensor.data_ptr, tensor.stride, tensor.element_size

    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.uint8, torch.bool):
        tensor = torch.zeros(2, 3, dtype=dtype)
        assert _C.describe(Older(tensor)) == _C.describe(tensor)


@pytest.mark.parametrize("wrong", [[1, 2], "text", None, np.array(["a"])])
def test_refuses_what_is_no_tensor(wrong: object) -> None:
    with pytest.raises(TypeError, match="expected a"):
        _C.describe(wrong)


def test_too_many_dimensions() -> None:
    with pytest.raises(ValueError, match="at most 6 dimensions, got 7"):
        _C.describe(torch.zeros(1, 1, 1, 1, 1, 1, 1))


def test_isa_and_threads() -> None:
    for name in _C.available_isas():
        _C.set_isa(name)
        assert _C.active_isa() == name
    with pytest.raises(ValueError, match=r"set_isa: name: expected one of \{base.*\} on this CPU, got 'mmx'"):
        _C.set_isa("mmx")
    _C.set_num_threads(3)
    assert _C.num_threads() == 3
    with pytest.raises(ValueError, match=r"expected an integer in \[1, 1024\], got 0"):
        _C.set_num_threads(0)
