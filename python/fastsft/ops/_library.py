"""The one way an op is registered with torch.

``Library.define`` + ``impl`` + ``register_fake`` rather than ``custom_op``: a call costs a third. Autograd sits in a
``torch.autograd.Function`` outside the op, so that an op's schema stays a plain function of tensors.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsft import _C
from fastsft.ops._registry import Implementation, record

_LIBRARY = torch.library.Library("fastsft", "DEF")  # type: ignore[no-untyped-call]


# For ops whose CUDA kernels are native.
ON_CUDA = (
    Implementation("native", "CUDA kernels, not yet run on a GPU")
    if _C.cuda_architectures()
    else Implementation("none", "built without CUDA kernels")
)


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    cpu: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
    cpu_is: Implementation | None = None,
    cuda_is: Implementation | None = None,
) -> Callable[..., Any]:
    """Register ``fastsft::<schema>`` and return the callable that dispatches it.

    Args:
        schema: torch schema without the namespace, e.g. ``"scale(Tensor x, float a) -> Tensor"``.
        fake: shapes and dtypes only; must create every output the implementations create.
        cpu, cuda: implementations; an op without a CUDA one raises torch's NotImplementedError there.
        cpu_is, cuda_is: what ``fastsft.info()`` reports; ``native`` when not given.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, cpu, "CPU")  # type: ignore[no-untyped-call]
    if cuda is not None:
        _LIBRARY.impl(name, on_device(cuda), "CUDA")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"fastsft::{name}", on_one_device(name, fake), lib=_LIBRARY)
    record(
        name,
        cpu=cpu_is or Implementation("native", "C++ kernel"),
        cuda=cuda_is
        or (Implementation("native", "CUDA kernel") if cuda else Implementation("none", "no CUDA kernel yet")),
    )
    op: Callable[..., Any] = getattr(torch.ops.fastsft, name).default
    return op


def on_one_device(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """The fake implementation, which the dispatcher takes for tensors on "meta" and for any tensors beside one there,
    whose outputs nobody would write."""

    @functools.wraps(fake)
    def run(*inputs: Any, **named: Any) -> Any:
        devices = {x.device.type for x in (*inputs, *named.values()) if isinstance(x, Tensor)}
        if "meta" in devices and len(devices) > 1:
            found = " and some on ".join(sorted(devices))
            raise ValueError(f"{name}: expected all tensors on one device, got some on {found}")
        return fake(*inputs, **named)

    return run


def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the device of its first tensor as the current one: a kernel starts on the current device, and
    torch's default stream has the same handle on all of them."""

    @functools.wraps(function)
    def run(*inputs: Any, **named: Any) -> Any:
        first = next(x for x in (*inputs, *named.values()) if isinstance(x, Tensor))
        with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
            return function(*inputs, **named)

    return run


def triton_or(plain: Callable[..., Any], module: str, launcher: str) -> dict[str, Any]:
    """``cuda`` and ``cuda_is`` of an op that ``launcher`` in ``ops/_triton/<module>.py`` serves where Triton is
    installed, and plain torch elsewhere. Triton is imported by the first call."""
    if importlib.util.find_spec("triton") is None:
        reason = "Triton is not installed: pip install 'fastsft[cuda]'"
        return {"cuda": plain, "cuda_is": Implementation("torch", reason)}

    @functools.cache
    def loaded() -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(importlib.import_module(f"fastsft.ops._triton.{module}"), launcher)
        return found

    def launch(*inputs: Any) -> Any:
        return loaded()(*inputs)

    return {"cuda": launch, "cuda_is": Implementation("triton", "Triton kernels, not yet run on a GPU")}


def autocast(first: Tensor, *others: Any) -> tuple[Any, ...]:
    """The tensors in the type that ``torch.autocast``, where it is on, wants matrix products in; others as they are."""
    kind = first.device.type
    if not torch.is_autocast_enabled(kind):
        return first, *others
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (first, *others))
