"""Where the engine's own small tensors are, whatever a script has made torch's default device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def on_host(function: Callable[P, R]) -> Callable[P, R]:
    """The function with the CPU as the default device."""

    @functools.wraps(function)
    def run(*arguments: P.args, **named: P.kwargs) -> R:
        if torch.empty(0).is_cpu:  # setting it would slow every call of torch down, asking for it this one
            return function(*arguments, **named)
        with torch.device("cpu"):
            return function(*arguments, **named)

    return run
