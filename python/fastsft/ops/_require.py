"""The one form of a refusal: the op, the argument, what was expected and what came."""

from __future__ import annotations


def require(condition: bool, op: str, name: str, expected: str, got: object) -> None:
    """Raises ValueError unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{op}: {name}: expected {expected}, got {got}")
