"""The scan for statements, blocks and brackets: by hand, and against Python's own parser."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsft import _C

SOURCE = '''\
@cache
async def f(a, b=(1, 2)):  # a ( in a comment
    """A ) in a string."""
    if a[0]:
        x = [1]; y = {2}
    elif b:

        # nothing
        return [x for x in a]
    else: pass
    try:
        from a import (b, c)
    finally:
        g(
            "(", ')',
        )
    return \\
        [1]
'''


def spans(text: str) -> list[str]:
    data = text.encode()
    return [data[begin:end].decode() for begin, end in _C.code_spans(data)]


def test_by_hand() -> None:
    body = SOURCE[SOURCE.index('"""') : -1]
    statement = body[body.index("if") : body.index("\n    try")]
    clause = statement[statement.index("elif") : statement.index("\n    else")]
    attempt = body[body.index("try") : body.index("\n    return \\")]
    call = attempt[attempt.index("g(") :]
    expected = [
        "@cache", SOURCE[:-1], SOURCE[SOURCE.index("async") : -1], "(a, b=(1, 2))", "(1, 2)", body,
        '"""A ) in a string."""', statement, "x = [1]; y = {2}", "x = [1]", "[1]", "y = {2}", "{2}", clause,
        "return [x for x in a]", "return [x for x in a]", "[x for x in a]", "else: pass", attempt,
        "from a import (b, c)", "from a import (b, c)", attempt[attempt.index("finally") :], call, call, call[1:],
        body[body.index("return \\") :], "[1]",
    ]  # fmt: skip
    assert sorted(spans(SOURCE)) == sorted(expected)


def test_comments_within_brackets() -> None:
    source = "f(  # it's ) one\n    1)\ny = 2"
    assert sorted(spans(source)) == sorted([source[:-6], source[1:-6], "y = 2"])


@pytest.mark.parametrize("path", sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-d]*.py")), ids=lambda p: p.name)
def test_every_statement_of_the_parser_is_found(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    found = set(_C.code_spans(source.encode()))
    lines = source.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    statements = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt):
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
            begin = starts[first - 1] + (node.col_offset - (first < node.lineno))
            if first < node.lineno:
                begin = starts[first - 1] + lines[first - 1].index(b"@")
            statements.add((begin, starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)))
    missed = {s for s in statements if s not in found}
    # "elif" is a statement of its own to the parser, and so is what follows a colon on the same line.
    text = source.encode()
    missed = {s for s in missed if not text[: s[0]].rstrip().endswith(b":") and text[s[0] : s[0] + 4] != b"elif"}
    assert len(missed) <= 0.01 * len(statements), [text[b:e] for b, e in missed][:3]


@settings(max_examples=300, deadline=None)
@given(st.text("if x:\n\t ()[]{}'\"#\\;@é", max_size=60) | st.binary(max_size=60))
def test_any_bytes_have_nested_spans(text: str | bytes) -> None:
    data = text.encode() if isinstance(text, str) else text
    found = _C.code_spans(data)
    for begin, end in found:
        assert 0 <= begin < end <= len(data)
        if isinstance(text, str):
            data[begin:end].decode()
    for a in found:
        for b in found:
            assert a[1] <= b[0] or b[1] <= a[0] or (a[0] <= b[0] and b[1] <= a[1]) or (b[0] <= a[0] and a[1] <= b[1])
