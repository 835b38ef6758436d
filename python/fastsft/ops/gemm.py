"""Linear layers on the native matrix product: forward, and backward into the input, the weight and the bias.

torch's float32 product runs AVX2 code on some CPUs that have AVX-512, and its float16 product is scalar on many; ours
uses the widest vectors there are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastsft import _C
from fastsft.ops._library import autocast, define
from fastsft.ops._registry import Implementation

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MIN_ROWS = 16  # with fewer a product is one pass over the weight, and packing it would be a second


def _choose() -> tuple[frozenset[torch.dtype], Implementation]:
    """The one rule of who computes ``linear`` on this CPU, as measured (docs/LOG.md): the types the packed product
    serves, and what ``fastsft.info()`` says. Where oneDNN has instructions of the type's own, it is faster."""
    isas = _C.available_isas()
    if isas == ["base"]:
        return frozenset(), Implementation("torch", "the packed product is slower without AVX2")
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    onednn = {
        torch.bfloat16: has_onednn and "avx512bf16" in isas,
        torch.float16: has_onednn and torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    types = [torch.float32, *(t for t in onednn if not onednn[t])]
    names = ", ".join(str(t).removeprefix("torch.") for t in types)
    reason = f"packed C++ product: {names}; torch: fewer than {_MIN_ROWS} rows"
    if left := [str(t).removeprefix("torch.") for t in onednn if onednn[t]]:
        reason += f", {' and '.join(left)} (oneDNN has this CPU's instructions for it)"
    return frozenset(types), Implementation("native", reason)


_NATIVE_TYPES, _CPU_IS = _choose()
_CUDA_IS = Implementation("torch", "cuBLAS through torch")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, as ``torch.nn.functional.linear``, under autocast too.

    The packed product serves it on the CPU where it is faster than torch, which serves the rest (see
    ``fastsft.info()``). With it there is no second derivative.

    Args:
        x: [..., K], floating point.
        weight: [N, K], like x.
        bias: [N], like x.

    Returns:
        [..., N] in x's type; sums in float32, rounded once, bias included.

    Raises:
        ValueError: shapes or dtypes out of contract, naming the argument.
    """
    x, weight, bias = autocast(x, weight, bias)
    if x.dtype not in _FLOATS or x.dim() < 1:
        raise ValueError(f"linear: x: expected floats [..., K], got {x.dtype} {list(x.shape)}")
    k = x.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != k or weight.dtype != x.dtype:
        raise ValueError(f"linear: weight: expected {x.dtype} [N, {k}], got {weight.dtype} {list(weight.shape)}")
    if weight.device != x.device:  # torch would take its meta implementation, and give memory that nobody wrote
        raise ValueError(f"linear: weight: expected all tensors on one device, got {x.device} and {weight.device}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        got = f"{bias.dtype} {list(bias.shape)}"
        raise ValueError(f"linear: bias: expected {x.dtype} [{weight.shape[0]}], got {got}")
    if not x.is_cpu or x.dtype not in _NATIVE_TYPES or x.numel() < _MIN_ROWS * k:
        return functional.linear(x, weight, bias)
    out: Tensor = _Linear.apply(x.flatten(0, -2), weight, bias)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], weight.shape[0])


def product(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> Tensor:
    """``out = a @ b`` or ``out += a @ b`` for matrices on the CPU, summed in float32 whatever the types.

    Below the dispatcher: no autograd, no fake tensors. Each of a [M, K] and b [K, N] has one contiguous dimension, out
    [M, N] has contiguous rows; the types of all three may differ.
    """
    _C.gemm(_matrix(a), _matrix(b), out, accumulate)
    return out


def _matrix(tensor: Tensor) -> Tensor:
    return tensor if 1 in tensor.stride() or 0 in tensor.shape else tensor.contiguous()


# --- the ops ----------------------------------------------------------------------------------------------------------


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return product(x, weight.t(), x.new_empty(x.shape[0], weight.shape[0]))
    return product(x, weight.t(), bias.repeat(x.shape[0], 1), accumulate=True)


def _backward(grad: Tensor, x: Tensor | None, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    d_x, d_weight = _fake_backward(grad, x, weight)
    if weight is not None:
        product(grad, weight, d_x)
    if x is not None:
        product(grad.t(), x, d_weight)
    return d_x, d_weight


def _fake_backward(grad: Tensor, x: Tensor | None, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    d_x = grad.new_empty(0 if weight is None else (grad.shape[0], weight.shape[1]))
    return d_x, grad.new_empty(0 if x is None else (grad.shape[1], x.shape[1]))


_linear = define(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    fake=lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
    cpu=_forward,
    cpu_is=_CPU_IS,
    cuda_is=_CUDA_IS,
)
_linear_backward = define(
    "linear_backward(Tensor grad, Tensor? x, Tensor? weight) -> (Tensor, Tensor)",
    fake=_fake_backward,
    cpu=_backward,
    cpu_is=_CPU_IS,
    cuda_is=_CUDA_IS,
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wants_x, wants_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)  # a frozen weight needs no x
        out: Tensor = _linear(x, weight, bias)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        d_x, d_weight = _linear_backward(grad, *ctx.saved_tensors)
        d_bias = grad.sum(0, dtype=torch.float32).to(grad.dtype) if wants_bias else None
        return d_x if wants_x else None, d_weight if wants_weight else None, d_bias
