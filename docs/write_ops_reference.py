"""Writes ops-reference.md from the signatures and docstrings of ``fastsft.ops``: ``make docs``, or this file alone."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastsft import ops

PAGE = Path(__file__).with_name("ops-reference.md")
_MEANS_MORE = re.compile(r"\b_(?!\w)|(?<!\w)_|<(?=[\w/!?])|\|")  # at the edge of a word, before a tag, in a table
_HEAD = """\
# Ops reference

`from fastsft import ops`. Shapes: T packed tokens, B sequences, H heads, D head size, V vocabulary. What each op is
for, with examples: [ops](ops.md). This page is made of the docstrings by `make docs`.

"""


def page() -> str:
    """The whole page."""
    names = sorted(ops.__all__)
    table = "".join(f"| [`{name}`](#{name}) | {_text(_parts(name)[0][1])} |\n" for name in names)
    return f"{_HEAD}| op | |\n|---|---|\n{table}\n" + "\n".join(map(_op, names))


def _op(name: str) -> str:
    function = getattr(ops, name)
    lines = [f"## {name}", "", "```python signature", _signature(function), "```", ""]
    for heading, text in _parts(name):
        if heading:
            lines += [f"**{heading}**", ""]
        lines += [_items(text) if heading in ("Args", "Raises") else _text(text, paragraphs=True), ""]
    return "\n".join(lines)


def _parts(name: str) -> list[tuple[str, str]]:
    """(heading, text) of a docstring: first its summary and what follows it, without a heading, then its sections and
    what stands between them."""
    summary, _, rest = (inspect.getdoc(getattr(ops, name)) or "").partition("\n\n")
    parts = [("", summary)]
    for paragraph in re.split(r"\n(?=\S+:$)|\n\n(?=\S)", rest, flags=re.M):
        heading, colon, body = paragraph.partition(":\n")
        if colon and heading in ("Args", "Returns", "Raises"):
            parts.append((heading, textwrap.dedent(body)))
        elif paragraph:
            parts.append(("", paragraph))
    return parts


def _items(text: str) -> str:
    """A list of ``name: what it is``."""
    items = [re.sub(r"\n[ ]+", "\n", item).partition(": ") for item in re.split(r"\n(?=\S)", text)]
    return "\n".join(f"- `{name}`: {_text(what)}" if what else f"- {_text(name)}" for name, _, what in items)


def _text(text: str, paragraphs: bool = False) -> str:
    """A docstring's markup as Markdown's: literals, references, and characters that mean something else there."""
    kept = text if paragraphs else " ".join(text.split())
    kept = re.sub(r":\w+:`~?(?:fastsft\.ops\.)?([\w.]+)`", _reference, kept)
    pieces = re.split(r"(``.+?``|\[?`[^`]+`(?:\]\(#\w+\))?)", kept, flags=re.S)
    for i, piece in enumerate(pieces):
        if i % 2:
            pieces[i] = f"`{' '.join(piece[2:-2].split())}`" if piece.startswith("``") else piece
        else:
            pieces[i] = _MEANS_MORE.sub(r"\\\g<0>", piece)
    return "".join(pieces)


def _reference(match: re.Match[str]) -> str:
    name = match[1]
    return f"[`{name}`](#{name})" if name in ops.__all__ else f"`{name}`"


def _signature(function: Callable[..., Any]) -> str:
    """As in the source, formatted as ruff would."""
    signature = inspect.signature(function)
    parts, keyword_only = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not keyword_only:
            parts.append("*")
            keyword_only = True
        default = "" if parameter.default is inspect.Parameter.empty else f" = {_literal(parameter.default)}"
        parts.append(f"{parameter.name}: {parameter.annotation}{default}")
    result = f" -> {signature.return_annotation}"
    name = f"def {function.__name__}"
    line = f"{name}({', '.join(parts)}){result}: ..."
    return line if len(line) <= 110 else f"{name}(\n    " + ",\n    ".join(parts) + f",\n){result}: ..."


def _literal(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
