"""The scan on what is no Python: brackets of C, JavaScript and Rust, alone and against the nodes of tree-sitter."""

from __future__ import annotations

import importlib
import random

import pytest

from fastsft import _C

RUST = """\
fn longest<'a>(x: &'a str, y: &[u8]) -> &'a str {
    // it's one ) too many
    let c = ('"', [1, 2]);
    if x.len() > y[0] { f(x) } else { g(&[x, y]) }
}
"""
C = """\
#include <stdio.h>
int main(int argc, char **argv) {
  // don't ) count
  for (int i = 0; i < argc; ++i) { printf("%s )\\n", argv[i]); }
  char c = '(';
  return f((struct s){1, {2}}, c);
}
"""
JAVASCRIPT = """\
const f = async (a, b = [1, 2]) => {
  // won't ( close
  const s = `a ) ${g(a)}`;
  return { x: h(a), "y)": [b] };
};
"""


def spans(text: str) -> list[str]:
    data = text.encode()
    return [data[begin:end].decode() for begin, end in _C.code_spans(data)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (RUST, ["('\"', [1, 2])", "[1, 2]", "{ f(x) }", "(x)", "{ g(&[x, y]) }", "(&[x, y])", "[x, y]"]),
        (C, ["(int argc, char **argv)", "(int i = 0; i < argc; ++i)", '("%s )\\n", argv[i])', "{1, {2}}", "{2}"]),
        (C, [C[C.index("{") : -1], '{ printf("%s )\\n", argv[i]); }', "((struct s){1, {2}}, c)"]),
        (JAVASCRIPT, ["(a, b = [1, 2])", "[1, 2]", "{g(a)}", "(a)", '{ x: h(a), "y)": [b] }', "[b]"]),
        (JAVASCRIPT, [JAVASCRIPT[JAVASCRIPT.index("{\n") : -2]]),
    ],
)
def test_brackets_of_other_languages(source: str, expected: list[str]) -> None:
    assert set(expected) <= set(spans(source))


@pytest.mark.parametrize("source", [RUST, C, JAVASCRIPT])
def test_a_bracket_closes_one_of_its_kind(source: str) -> None:
    pairs = {"(": ")", "[": "]", "{": "}"}
    brackets = [s for s in spans(source) if s[0] in pairs and s[-1] in pairs.values()]
    assert all(pairs[s[0]] == s[-1] for s in brackets)
    assert len(brackets) >= 7


@pytest.mark.parametrize(
    ("source", "expected"),
    [("{ ) }", "{ ) }"), ("{ ( }", "{ ( }"), ("[ { ( ] x }", "[ { ( ]"), ("(" * 9 + "]", None)],
)
def test_strays_cost_nothing_else(source: str, expected: str | None) -> None:
    found = [s for s in spans(source) if s[0] in "([{" and s[-1] in ")]}" and s != source] + [source]
    assert (expected or source) in found
    assert all({"(": ")", "[": "]", "{": "}"}.get(s[0]) == s[-1] for s in found if s != source)


def blocks(seed: int) -> str:
    """Nested calls, lists and blocks with balanced brackets, as in C, Java, JavaScript, Go or Rust."""
    rng = random.Random(seed)

    def expression(depth: int) -> str:
        if depth == 0:
            return rng.choice(["x", "1", '"a ) b"', "y"])
        return f"f({', '.join(expression(depth - 1) for _ in range(rng.randint(1, 3)))})"

    def body(depth: int) -> str:
        if depth == 0:
            return f"  g({expression(2)});\n"
        return "".join(f"if (x) {{\n{body(depth - 1)}}}\n" for _ in range(rng.randint(1, 2)))

    return body(3)


@pytest.mark.parametrize("language", ["cpp", "java", "javascript"])
def test_bracketed_nodes_of_tree_sitter_are_found(language: str) -> None:
    """Every node that a parser gives and that is a pair of brackets, in source that the test writes."""
    tree_sitter = pytest.importorskip("tree_sitter")
    pytest.importorskip(f"tree_sitter_{language}")
    parser = tree_sitter.Parser(tree_sitter.Language(importlib.import_module(f"tree_sitter_{language}").language()))
    for seed in range(20):
        inner = blocks(seed)
        source = f"class A {{ void m() {{\n{inner}}} }}" if language == "java" else inner
        data = source.encode()
        found = set(_C.code_spans(data))
        waiting, nodes = [parser.parse(data).root_node], set()
        while waiting:
            node = waiting.pop()
            waiting += node.named_children
            if data[node.start_byte : node.start_byte + 1] in (b"(", b"{"):
                nodes.add((node.start_byte, node.end_byte))
        assert not parser.parse(data).root_node.has_error
        assert len(nodes) > 5
        assert nodes <= found, [data[a:b] for a, b in nodes - found][:3]
