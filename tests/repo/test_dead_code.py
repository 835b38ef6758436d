"""Nothing in the package is written for nobody, and nothing twice."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "fastsft"
# Called by name elsewhere: HTTP routes and their error handlers, checks of a request's fields.
REGISTERED_BY = ["@app.*", "@pydantic.model_validator"]
SAME_NODES = 60  # of a syntax tree, about six lines: below that, alike is not copied


def test_every_function_is_used() -> None:
    """Of fields and variables nothing is said: a configuration's are read by the names in its table."""
    vulture = pytest.importorskip("vulture")
    found = vulture.Vulture(ignore_names=["__getattr__", "__dir__"], ignore_decorators=REGISTERED_BY)
    found.scavenge([str(ROOT / part) for part in ("python", "bench", "tests", "docs", "examples", ".ci")])
    kinds = ("class", "function", "import", "method", "property", "unreachable_code")
    unused = [
        f"{item.filename.relative_to(ROOT)}:{item.first_lineno}: {item.typ} {item.name}"
        for item in found.get_unused_code(min_confidence=60)
        if item.filename.is_relative_to(PACKAGE) and item.typ in kinds
    ]
    assert unused == []


def test_no_function_is_a_copy() -> None:
    same = defaultdict(list)
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "bench").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                body = node.body[ast.get_docstring(node) is not None :]
                if sum(1 for part in body for _ in ast.walk(part)) >= SAME_NODES:
                    same["".join(map(ast.dump, body))].append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert [places for places in same.values() if len(places) > 1] == []
