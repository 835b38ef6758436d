"""Methods of single modules, replaced and put back."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch

_PATCH = "_fastsft_patch"
_REPLICATE = "_replicate_for_data_parallel"  # what torch.nn.DataParallel calls on every module


class _Patch:
    """On a patched module: what its own ``forward`` was (None: its class's), and the function put there."""

    def __init__(self, before: Callable[..., Any] | None, method: Callable[..., Any]) -> None:
        self.before, self.method = before, method

    def __deepcopy__(self, memo: dict[int, Any]) -> _Patch:
        return _Patch(copy.deepcopy(self.before, memo), self.method)

    def __reduce__(self) -> NoReturn:
        # A method of an instance is pickled by its name: what is read back would be half enabled, without a word.
        raise TypeError(
            "fastsft: an enabled model cannot be pickled; save its state_dict, or call disable(model) before and "
            "enable(model) on what is read back"
        )


def replace_forward(module: torch.nn.Module, forward: Callable[..., Any]) -> None:
    """``forward(self, ...)`` for this module alone; :func:`original` inside it calls what was there.

    The signature stays: trainers read from it which columns a model takes. Nothing is kept in closures, so that a deep
    copy of the module calls its own methods.

    Raises:
        ValueError: it is replaced already.
    """
    if is_patched(module):
        raise ValueError(f"fastsft: the forward of {type(module).__name__} is replaced already; call disable() first")

    @functools.wraps(type(module).forward)
    def method(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    setattr(module, _PATCH, _Patch(module.__dict__.get("forward"), method))  # before forward: pickle meets it first
    setattr(module, _REPLICATE, _refuse_replicas)
    module.forward = types.MethodType(method, module)


def original(module: torch.nn.Module) -> Callable[..., Any]:
    """The forward that was replaced, bound."""
    before = getattr(module, _PATCH).before
    bound: Callable[..., Any] = types.MethodType(type(module).forward, module) if before is None else before
    return bound


def is_patched(module: torch.nn.Module) -> bool:
    return _PATCH in module.__dict__


def has_own_forward(module: torch.nn.Module) -> bool:
    """Whether somebody else has replaced the forward of this one instance (a wrapper, accelerate's hooks). What hooks
    leave behind when they are removed is the class's own."""
    given = module.__dict__.get("forward")
    return given is not None and not is_patched(module) and given != types.MethodType(type(module).forward, module)


def restore_forwards(modules: Iterable[torch.nn.Module]) -> None:
    """Undo :func:`replace_forward` on all of them, or on none.

    Raises:
        RuntimeError: something else has replaced a forward since, and would be lost.
    """
    modules = list(modules)
    for module in modules:
        if getattr(module.__dict__.get("forward"), "__func__", None) is not getattr(module, _PATCH).method:
            name = type(module).__name__
            raise RuntimeError(f"fastsft: the forward of {name} has been wrapped since enable(); undo that first")
    for module in modules:
        before = getattr(module, _PATCH).before
        for name in ("forward", _PATCH, _REPLICATE):
            delattr(module, name)
        if before is not None:
            module.forward = before


def _refuse_replicas() -> NoReturn:
    raise RuntimeError(
        "fastsft: torch.nn.DataParallel makes replicas whose forward is bound to the original model; start one process "
        "per device (torchrun), show this one a single device (CUDA_VISIBLE_DEVICES), or call disable(model)"
    )
