"""``--speculative-config``, of the verbs that generate."""

from __future__ import annotations

import json
from typing import Any

from fastsft.verbs.console import UsageError


def read_speculation(verb: str, text: str | None) -> dict[str, Any] | None:
    """What the flag's JSON says; the engine knows which methods and options there are.

    Raises:
        UsageError: it is no JSON object.
    """
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError:
        found = text
    if not isinstance(found, dict):
        message = f"""expected a JSON object such as '{{"method": "ngram"}}', got {text[:200]!r}"""
        raise UsageError(f"{verb}: --speculative-config: {message}")
    return found
