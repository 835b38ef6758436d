"""The matrix products of the loss and the memory they write to."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsft.ops._memory import large_empty
from fastsft.ops.gemm import product

# torch >= 2.8 has 16-bit products with a float32 result on CUDA. addmm would be the plain choice, but in some releases
# it wants what is added to be of 16 bits too.
HAS_WIDE_RESULTS = hasattr(torch.ops.aten.baddbmm, "dtype_out")


def multiply(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """``out = a @ b`` or ``out += a @ b``, summed in float32; out may be float32 where a and b are of 16 bits."""
    if out.device.type == "cpu":
        product(a, b, out, accumulate=accumulate)
    else:
        multiply_cuda(a, b, out, accumulate=accumulate)


def multiply_cuda(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    if out.dtype == a.dtype:
        out.addmm_(a, b, beta=int(accumulate))
    elif HAS_WIDE_RESULTS:
        whole = out[None]  # the same object twice: torch then adds in place
        torch.baddbmm(whole, a[None], b[None], beta=int(accumulate), out_dtype=out.dtype, out=whole)
    elif accumulate:
        out += torch.mm(a, b)  # rounded to 16 bits before it is added
    else:
        out.copy_(torch.mm(a, b))


_kept = threading.local()  # the scratch of the last call on the CPU, bytes


def scratch(count: int, elements: int, like: Tensor) -> Sequence[Tensor]:
    """As many tensors [elements] like another. On the CPU, where torch gives large memory back to the system, they are
    kept from call to call: faulting fresh pages in can take as long as a product. On a GPU torch keeps them."""
    if like.device.type != "cpu":
        return large_empty((count, elements), like).unbind(0)
    size = count * elements * like.element_size()
    kept: Tensor | None = getattr(_kept, "bytes", None)
    if kept is None or kept.numel() < size:
        kept = _kept.bytes = None  # before the larger one is taken
        kept = _kept.bytes = large_empty((size,), like, torch.uint8)
    return kept[:size].view(like.dtype).view(count, elements).unbind(0)
