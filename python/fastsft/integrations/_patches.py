"""Methods of single modules, replaced and put back."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch

_BEFORE = "_fastsft_before"  # on a patched module: what its forward was, None for its class's
_NOW = "_fastsft_now"  # and what it was replaced by


def replace_forward(module: torch.nn.Module, forward: Callable[..., Any]) -> None:
    """``forward(self, ...)`` for this module alone; :func:`original` inside it calls what was there.

    The signature stays: trainers read from it which columns a model takes. Nothing is kept in closures, so that a deep
    copy of the module calls its own methods.

    Raises:
        ValueError: it is replaced already.
    """
    if is_patched(module):
        raise ValueError(f"fastsft: the forward of {type(module).__name__} is replaced already; call disable() first")
    before = module.__dict__.get("forward")

    @functools.wraps(type(module).forward)
    def method(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    setattr(module, _BEFORE, before)
    setattr(module, _NOW, method)
    module.forward = types.MethodType(method, module)


def original(module: torch.nn.Module) -> Callable[..., Any]:
    """The forward that was replaced, bound."""
    before = getattr(module, _BEFORE)
    bound: Callable[..., Any] = types.MethodType(type(module).forward, module) if before is None else before
    return bound


def is_patched(module: torch.nn.Module) -> bool:
    return _BEFORE in module.__dict__


def restore_forward(module: torch.nn.Module) -> None:
    """Undo :func:`replace_forward`.

    Raises:
        RuntimeError: something else has replaced the forward since, and would be lost.
    """
    if getattr(module.__dict__.get("forward"), "__func__", None) is not getattr(module, _NOW):
        name = type(module).__name__
        raise RuntimeError(f"fastsft: the forward of {name} has been wrapped since enable(); undo that first")
    before = getattr(module, _BEFORE)
    del module.forward
    delattr(module, _BEFORE)
    delattr(module, _NOW)
    if before is not None:
        module.forward = before
