"""Which implementation serves each op on which device, and why; ``fastsft.info()`` shows it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Implementation:
    """What runs for one op on one device."""

    kind: str  # "native" (C++ or CUDA C++), "triton", "torch" (plain torch) or "none"
    reason: str  # one sentence: why this one


REGISTRY: dict[str, dict[str, Implementation]] = {}


def record(name: str, **devices: Implementation) -> None:
    """Report an implementation of an op. Ops that torch dispatches are recorded by ``_library.define``."""
    REGISTRY.setdefault(name, {}).update(devices)
