"""What is said of a configuration that cannot be used."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, what was expected and what came."""


def unknown_key(name: str, known: Sequence[str]) -> str:
    """What to say about the dotted ``name`` whose last part is none of ``known``: the nearest one, or all of them."""
    near = difflib.get_close_matches(name.rpartition(".")[2], known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key {name!r}; {hint}"
