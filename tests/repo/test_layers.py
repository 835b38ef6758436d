"""The import rules of docs/design.md, read from the source text: who may import, or include, whom."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python" / "fastsft"

# part of the package -> parts it may import besides itself
ALLOWED: dict[str, set[str]] = {
    "ops": {"_C"},
    "models": {"ops", "files"},
    "data": {"ops", "models", "config", "files", "progress"},
    # of the engine only what the package exports
    "train": {"ops", "models", "data", "config", "files", "progress", "verify", "info", "LLM", "SamplingParams"},
    "engine": {"ops", "models", "progress"},
    "verify": set(),
    "synthesis": {"ops", "models", "data", "train", "engine", "verify", "config", "files", "progress"},
    "integrations": {"ops"},
    "bench": {"info", "ops", "progress"},
    "config": set(),
    "gpu": set(),
    "files": set(),
    "progress": set(),
    "info": {"ops", "_C", "__version__", "gpu"},
}
ANYTHING = {"cli", "verbs", "demo", "report", "__main__", "__init__"}

# installed by extras only: a top-level import would make them required
OPTIONAL = {
    "pyarrow", "datasets", "matplotlib", "transformers", "triton", "cuda", "fastapi", "uvicorn", "ray",
    "tree_sitter", "tree_sitter_python", "bitsandbytes", "peft", "wandb", "trackio", "tensorboard",
    "starlette", "prometheus_client", "trl", "accelerate",
}  # fmt: skip
# made of optional packages, at the top of their modules: imported as those are. Kernels, which Triton reads as source,
# the server's endpoints, and the plug-ins
WHOLLY_OPTIONAL = ("fastsft.ops._triton", "fastsft.engine.server", "fastsft.integrations")


def sources() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Every imported dotted name, with ``from a import b`` as ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_python_layers(path: Path) -> None:
    part = part_of(path)
    if part in ANYTHING:
        return
    assert part in ALLOWED, f"{path}: unknown part {part!r}: add it to ALLOWED and to docs/design.md"
    for name, node in imports(ast.parse(path.read_text())):
        words = name.split(".")
        if words[0] == "fastsft" and len(words) > 1:
            assert words[1] in ALLOWED[part] | {part}, f"{path}:{node.lineno}: {part} may not import {name}"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_optional_packages_are_imported_where_used(path: Path) -> None:
    if ".".join(("fastsft", *path.relative_to(PACKAGE).parts[:-1])) in WHOLLY_OPTIONAL:
        return
    tree = ast.parse(path.read_text())
    inside = {
        id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)
    }
    typing_only = {
        id(n)
        for f in ast.walk(tree)
        if isinstance(f, ast.If) and "TYPE_CHECKING" in ast.unparse(f.test)
        for n in ast.walk(f)
    }
    for name, node in imports(tree):
        if name.split(".")[0] in OPTIONAL or f"{name}.".startswith(tuple(f"{p}." for p in WHOLLY_OPTIONAL)):
            assert id(node) in inside | typing_only, (
                f"{path}:{node.lineno}: import {name} inside the function that uses it"
            )


def test_no_assert_on_user_input() -> None:
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Assert), (
                f"{path}:{node.lineno}: assert vanishes under python -O; raise instead"
            )


INCLUDES = {
    "include": {"fastsft"},
    "cpu": {"fastsft", "local"},
    "cuda": {"fastsft", "local", "cuda"},
    "bindings": {"fastsft", "local", "pybind11"},
}


@pytest.mark.parametrize("layer", sorted(INCLUDES))
def test_include_layers(layer: str) -> None:
    for path in sorted((ROOT / "csrc" / layer).rglob("*")):
        if path.suffix not in {".h", ".cpp", ".cu", ".cuh"}:
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if not (match := re.match(r'\s*#include\s*([<"])([^>"]+)[>"]', line)):
                continue
            bracket, target = match.groups()
            kind = target.split("/")[0] if "/" in target else ("local" if bracket == '"' else "standard")
            if target.startswith(("cuda", "mma")) or target in {"curand.h"}:
                kind = "cuda"
            if target.startswith("sys/"):
                kind = "standard"
            where = f"{path}:{number}: {layer} may not include {target}"
            assert kind == "standard" or kind in INCLUDES[layer], where
            assert not target.startswith(("torch", "ATen", "c10", "Python.h")), where


def test_inline_ptx_only_in_primitives() -> None:
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in {".cu", ".cuh", ".h", ".cpp"} and not path.name.startswith("primitives"):
            assert not re.search(r"\basm\b\s*(volatile)?\s*\(", path.read_text()), f"{path}: inline assembly"


def test_names_of_tests_differ() -> None:
    """pytest imports test modules by their names alone: of two with one name it can collect only the first."""
    names = [p.name for p in (ROOT / "tests").rglob("*.py") if p.name not in ("conftest.py", "__init__.py")]
    assert len(names) == len(set(names)), sorted({n for n in names if names.count(n) > 1})
