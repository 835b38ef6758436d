"""What the pages of the data reports share: their head and how they are filled in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; color: #1f2933; }
table { border-collapse: collapse; } td, th { padding: .25rem .8rem; text-align: left; vertical-align: top; }
tr:nth-child(even) { background: #f4f6f8; } td.n { text-align: right; font-variant-numeric: tabular-nums; }
pre { margin: .2rem 0; font-size: 13px; white-space: pre-wrap; } .note { color: #52606d; }
svg { max-width: 620px; height: auto; }
</style></head><body>
<h1>{{ title }}</h1>
"""


def render(
    title: str, body: str, values: dict[str, Any], filters: Mapping[str, Callable[[Any], str]] | None = None
) -> str:
    """A self-contained page; the values' text is escaped."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    environment.filters |= filters or {}
    return environment.from_string(_HEAD + body + "</body></html>\n").render(title=title, **values)
