"""Tasks whose answers can be checked by running them, as they stand in files."""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsft.verify.compare import COMPARATORS


@dataclass(frozen=True)
class Task:
    """A sample is appended to ``prefix`` (empty for whole solutions, a function head for completions). It passes if
    ``check``, code that runs after it in the same module, raises nothing; or, where there are ``cases``, if for each
    pair of them it reads the first from standard input and writes the second to standard output, as ``compare`` sees it
    (:func:`fastsft.verify.compare.agrees`) or the code in ``checker`` does (:func:`fastsft.verify.compare.checked`)."""

    task_id: str | int
    prompt: str
    check: str = ""
    prefix: str = ""
    cases: tuple[tuple[str, str], ...] = ()
    language: str = "python"
    compare: str = "lines"
    tolerance: float = 1e-6
    checker: str = ""


def read_rows(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of each line of a JSONL(.gz) file that is not empty.

    Raises:
        ValueError: a line that is no JSON object (names file and line), or a file that is no gzip file to its end.
    """
    where = Path(path)
    opener: Any = gzip.open if where.suffix == ".gz" else open
    try:
        with opener(where, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield f"{where}:{number}", _object(line, f"{where}:{number}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{where}: damaged, or not compressed with gzip: {error}") from None


def _object(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: expected an object: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected an object, got {type(row).__name__}")
    return row


def read_tasks(path: str | os.PathLike[str]) -> list[Task]:
    """Tasks of a JSONL(.gz) file: rows with task_id, prompt and ``check``; or ``cases``, a list of objects with input
    and output, perhaps with language, compare, tolerance and checker; or HumanEval's test and entry_point.

    Raises:
        ValueError: a row that is none of these; names file and line.
    """
    tasks = []
    for place, row in read_rows(path):
        try:
            tasks.append(_task(row))
        except KeyError as error:
            expected = "task_id, prompt and check, cases (each with input and output) or test and entry_point"
            raise ValueError(f"{place}: expected {expected}, found no {error}") from None
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    return tasks


def _task(row: dict[str, Any]) -> Task:
    task_id, prompt = row["task_id"], _text(row, "prompt")
    if type(task_id) not in (str, int):  # MBPP has numbers
        raise ValueError(f"task_id: expected text or a number, got {task_id!r:.80}")
    if "entry_point" in row:  # a completion of the prompt, checked by check(function)
        return Task(task_id, prompt, f"{_text(row, 'test')}\n\ncheck({_text(row, 'entry_point')})", prompt)
    prefix, language = _text(row, "prefix", ""), _text(row, "language", "python")
    if "cases" not in row:
        if language != "python":
            raise ValueError(f"language: expected cases with a task in {language}, a check is Python")
        return Task(task_id, prompt, _text(row, "check"), prefix)
    compare, tolerance = _text(row, "compare", "lines"), row.get("tolerance", 1e-6)
    if compare not in COMPARATORS:
        raise ValueError(f"compare: expected one of {', '.join(COMPARATORS)}, got {compare!r}")
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance: expected a number from 0, got {tolerance!r}")
    checker = _text(row, "checker", "")
    cases = _cases(row["cases"], checked=bool(checker))
    return Task(task_id, prompt, "", prefix, cases, language, compare, tolerance, checker)


def _cases(rows: Any, *, checked: bool) -> tuple[tuple[str, str], ...]:
    """``checked``: an output may be left out, as only the checker can judge it."""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"cases: expected at least one object with input and output, got {rows!r:.80}")
    return tuple((_text(row, "input"), _text(row, "output", "" if checked else None)) for row in rows)


def _text(row: dict[str, Any], name: str, default: str | None = None) -> str:
    value = row[name] if default is None else row.get(name, default)
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected text, got {value!r:.80}")
    return value


def extract_code(text: str) -> str:
    """The first fenced block of an answer, or the whole answer where there is none."""
    _, fence, rest = text.partition("```")
    if not fence:
        return text
    body = rest.partition("```")[0]
    language, newline, code = body.partition("\n")
    return code if newline and (not language.strip() or language.strip().isalnum()) else body
