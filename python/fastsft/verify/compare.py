"""Is what a program wrote what it should have written?"""

from __future__ import annotations

import json
import math

from fastsft.verify.sandbox import Limits, run

COMPARATORS = ("exact", "lines", "tokens", "floats")

_CHECKER = "import json, sys\ngiven, expected, written = json.load(sys.stdin)\ndel json, sys"


def agrees(written: str, expected: str, compare: str, tolerance: float) -> bool:
    """Whether two outputs are the same.

    Args:
        compare: ``exact``; ``lines``: but for blanks at the ends of lines and empty lines at the end; ``tokens``: but
            for the blanks between words; ``floats``: so, and numbers need only be close.
        tolerance: for ``floats``, relative and absolute.
    """
    if compare == "exact":
        return written == expected
    if compare == "lines":
        return _lines(written) == _lines(expected)
    got, wanted = written.split(), expected.split()
    if compare == "tokens":
        return got == wanted
    return len(got) == len(wanted) and all(_close(a, b, tolerance) for a, b in zip(got, wanted, strict=True))


def checked(checker: str, given: str, expected: str, written: str, limits: Limits | None) -> str | None:
    """What a checker objects to, None if nothing. It is Python, with those three as variables, and accepts by coming to
    its end; whatever it raises is an objection, as outputs may be anything. It has a sandbox for itself, so that the
    program cannot tamper with it.

    Raises:
        ValueError: it is not Python.
    """
    result = run(_CHECKER, check=checker, stdin=json.dumps([given, expected, written]), limits=limits)
    if result.status == "ok":
        return None
    last = result.stderr.strip().rpartition("\n")[2]
    if result.status == "compile_error":
        raise ValueError(f"checker: {last}")
    return last if result.status in ("wrong", "error") else f"the checker ended in {result.status}: {last}"


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _close(a: str, b: str, tolerance: float) -> bool:
    if a == b:
        return True
    try:
        return math.isclose(float(a), float(b), rel_tol=tolerance, abs_tol=tolerance)
    except ValueError:
        return False
