"""What the verbs write: results on stdout, and files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


class UsageError(ValueError):
    """Input the user can mend; shown without a traceback."""


def write_text(path: Path, text: str) -> None:
    stage = path.with_name(f".{path.name}.tmp")
    stage.write_text(text, encoding="utf-8")
    stage.replace(path)


def to_json(value: Any) -> str:
    """Indented JSON. NaN and infinity, which JSON does not have, become null."""
    return json.dumps(_finite(value), indent=2, allow_nan=False) + "\n"


def print_json_line(value: Any) -> None:
    """At once, for who reads line by line from a process that goes on."""
    print(json.dumps(_finite(value), allow_nan=False), flush=True)


def print_json(value: Any) -> None:
    print(to_json(value), end="")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
