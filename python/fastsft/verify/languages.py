"""Programs in any language: a few lines of TOML say how they are compiled and run, and only their output counts."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsft.verify.pool import POOL
from fastsft.verify.sandbox import Limits, SandboxResult, interpreter_paths, run_in, system_paths

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_COMPILE = Limits(seconds=30.0, memory_bytes=2 << 30, file_bytes=64 << 20)


@dataclass(frozen=True)
class Language:
    """``compile``, if there is any, runs once in the folder with ``file``, then ``run`` in a copy of the folder for
    each input. ``limits`` are fields of :class:`Limits` that differ from the caller's; ``readable`` are paths that the
    commands need besides the system's."""

    name: str
    file: str
    run: tuple[str, ...]
    compile: tuple[str, ...] = ()
    readable: tuple[str, ...] = ()
    limits: Mapping[str, Any] = field(default_factory=dict, hash=False)
    compile_limits: Limits = _COMPILE


def read_languages(path: str | os.PathLike[str]) -> dict[str, Language]:
    """Languages of a TOML file: a table for each, with file, run, and optionally compile, readable, limits and
    compile_limits.

    Raises:
        ValueError: something else in it; names file, language and key.
    """
    where = Path(path)
    try:
        tables = tomllib.loads(where.read_text(encoding="utf-8"))
        return {name: _language(name, table) for name, table in tables.items()}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None


@functools.cache
def built_in_languages() -> Mapping[str, Language]:
    """Those of languages.toml in this package. Python is none of them: it runs in an interpreter that is already up."""
    return read_languages(Path(__file__).with_name("languages.toml"))


def _language(name: str, table: object) -> Language:
    if not isinstance(table, dict):
        raise ValueError(f"{name}: expected a table, got {table!r}")
    names = {f.name for f in dataclasses.fields(Language)} - {"name"}
    if unknown := sorted(table.keys() - names):
        raise ValueError(f"{name}: expected {', '.join(sorted(names))}, got {unknown[0]!r}")
    file = table.get("file")
    if not isinstance(file, str) or not file or os.path.basename(file) != file:
        raise ValueError(f"{name}.file: expected a file's name, got {file!r}")
    values: dict[str, Any] = {"name": name, "file": file}
    for key in ("run", "compile", "readable"):
        value = table.get(key, [])
        fits = isinstance(value, list) and all(isinstance(v, str) and v for v in value)
        if not fits or (key == "run" and not value):
            raise ValueError(f"{name}.{key}: expected a list of strings, got {value!r}")
        values[key] = tuple(value)
    limits, compile_limits = (_limits(name, key, table.get(key, {})) for key in ("limits", "compile_limits"))
    values["limits"] = limits
    return Language(**values, compile_limits=dataclasses.replace(_COMPILE, **compile_limits))


def _limits(name: str, key: str, given: object) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(Limits)]
    if not isinstance(given, dict) or not given.keys() <= set(names):
        raise ValueError(f"{name}.{key}: expected a table with any of {', '.join(names)}, got {given!r}")
    Limits(**given)
    return given


@contextlib.contextmanager
def program(language: Language | None, code: str, limits: Limits | None) -> Iterator[Callable[[str], SandboxResult]]:
    """A function that runs the program on an input. Where it does not compile, that is the answer to every input.

    Args:
        language: None for Python.

    Raises:
        SupervisorError: the process that runs it could not be started, or was killed.
    """
    limits = limits or Limits()
    if language is None:
        with POOL.lease(interpreter_paths()) as supervisor:
            given: dict[str, Any] = {"code": code, "check": ""}
            yield lambda stdin: run_in(supervisor, given, interpreter_paths(), stdin=stdin, limits=limits)
        return
    readable = system_paths(language.readable)
    limits = dataclasses.replace(limits, **language.limits)
    with POOL.lease(readable) as supervisor:
        files: dict[str, Any] = {"files": {language.file: code}}
        if language.compile:
            given = {**files, "argv": language.compile, "keep": True}
            compiled = run_in(supervisor, given, readable, limits=language.compile_limits)
            if compiled.status != "ok":
                failed = compiled if compiled.status == "refused" else _not_compiled(compiled)
                yield lambda stdin: failed
                return
            files = {"from_built": True}
        given = {**files, "argv": language.run}
        yield lambda stdin: run_in(supervisor, given, readable, stdin=stdin, limits=limits)


def _not_compiled(result: SandboxResult) -> SandboxResult:
    why = "" if result.status == "error" else f"compiling ended in {result.status}\n"
    return dataclasses.replace(result, status="compile_error", stderr=result.stderr + why)
