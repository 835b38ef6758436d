"""Functions and classes of the Python standard library, and instruction pairs made from their docstrings."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SKIPPED = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "__pycache__", "encodings",
            "turtledemo", "ensurepip", "lib-dynload", "pydoc_data"}  # fmt: skip


@dataclass(frozen=True)
class Definition:
    """A top-level function, a method or a class."""

    source: str  # "json/decoder.py:12"
    text: str
    signature: str
    docstring: str


def definitions(*, shortest: int = 100, longest: int = 4000, limit: int | None = None) -> list[Definition]:
    """All definitions of ``shortest`` to ``longest`` characters, in the order of file names and lines."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[Definition] = []
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED & set(path.relative_to(root).parts[:-1]):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # templates and deliberately broken files
        lines = source.splitlines(keepends=True)
        for node in _nodes(tree):
            text = _dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
            if shortest <= len(text) <= longest:
                place = f"{path.relative_to(root)}:{node.lineno}"
                found.append(Definition(place, text, _signature(text), ast.get_docstring(node) or ""))
        if limit is not None and len(found) >= limit:
            return found[:limit]
    return found


def _nodes(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node
        if isinstance(node, ast.ClassDef):
            yield from (n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def _dedent(text: str) -> str:
    indent = len(text) - len(text.lstrip(" "))
    return "".join(line[indent:] if line.startswith(" " * indent) else line for line in text.splitlines(keepends=True))


def _signature(text: str) -> str:
    return text.partition("\n")[0].rstrip(":").strip()


def instruction_pairs(found: list[Definition], *, longest: int = 300) -> list[list[dict[str, str]]]:
    """Conversations: the docstring's first line and the signature ask, the definition answers."""
    pairs = []
    for d in found:
        summary = d.docstring.strip().partition("\n")[0]
        if len(summary) < 12 or not d.signature.startswith("def ") or len(d.text) > longest:
            continue
        ask = f"Write `{d.signature}`: {summary}"
        pairs.append([{"role": "user", "content": ask}, {"role": "assistant", "content": d.text.rstrip()}])
    return pairs
