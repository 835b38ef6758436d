"""Tasks whose answers can be checked by running them, as they stand in files."""

from __future__ import annotations

import gzip
import json
import math
import os
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

    task_id: str
    prompt: str
    check: str = ""
    prefix: str = ""
    cases: tuple[tuple[str, str], ...] = ()
    language: str = "python"
    compare: str = "lines"
    tolerance: float = 1e-6
    checker: str = ""


def read_tasks(path: str | os.PathLike[str]) -> list[Task]:
    """Tasks of a JSONL(.gz) file: rows with task_id, prompt and ``check``; or ``cases``, a list of objects with input
    and output, perhaps with language, compare, tolerance and checker; or HumanEval's test and entry_point.

    Raises:
        ValueError: a row that is none of these; names file and line.
    """
    where = Path(path)
    opener: Any = gzip.open if where.suffix == ".gz" else open
    tasks = []
    with opener(where, "rt", encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                tasks.append(_task(json.loads(line)))
            except KeyError as error:
                expected = "task_id, prompt and check or cases (each with input and output)"
                raise ValueError(f"{where}:{number}: expected {expected}, found no {error}") from None
            except (json.JSONDecodeError, TypeError) as error:
                raise ValueError(f"{where}:{number}: expected an object: {error}") from None
            except ValueError as error:
                raise ValueError(f"{where}:{number}: {error}") from None
    return tasks


def _task(row: dict[str, Any]) -> Task:
    if "entry_point" in row:  # a completion of the prompt, checked by check(function)
        check = f"{row['test']}\n\ncheck({row['entry_point']})"
        return Task(row["task_id"], row["prompt"], check, row["prompt"])
    if "cases" in row:
        # An output that is left out is one that only the checker can judge.
        checker = _text(row, "checker", "")
        cases = tuple((c["input"], c.get("output", "") if checker else c["output"]) for c in row["cases"])
        if not cases or not all(isinstance(text, str) for case in cases for text in case):
            raise TypeError("cases: expected at least one pair of strings")
        compare, tolerance = _text(row, "compare", "lines"), row.get("tolerance", 1e-6)
        if compare not in COMPARATORS:
            raise ValueError(f"compare: expected one of {', '.join(COMPARATORS)}, got {compare!r}")
        if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < math.inf:
            raise ValueError(f"tolerance: expected a number from 0, got {tolerance!r}")
        language = _text(row, "language", "python")
        return Task(
            row["task_id"], row["prompt"], "", row.get("prefix", ""), cases, language, compare, tolerance, checker
        )
    if _text(row, "language", "python") != "python":
        raise ValueError(f"language: expected cases with a task in {row['language']}, a check is Python")
    return Task(row["task_id"], row["prompt"], row["check"], row.get("prefix", ""))


def _text(row: dict[str, Any], name: str, default: str) -> str:
    value = row.get(name, default)
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected text, got {value!r}")
    return value


def extract_code(text: str) -> str:
    """The first fenced block of an answer, or the whole answer where there is none."""
    _, fence, rest = text.partition("```")
    if not fence:
        return text
    body = rest.partition("```")[0]
    language, newline, code = body.partition("\n")
    return code if newline and (not language.strip() or language.strip().isalnum()) else body
