"""What all parts of a configuration have in common."""

from __future__ import annotations

from typing import Any, ClassVar


class Section:
    """Base of the dataclasses: pydantic takes no key that is not a field."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
