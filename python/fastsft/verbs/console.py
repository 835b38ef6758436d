"""What the verbs print: progress on stderr, results on stdout."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress


class UsageError(ValueError):
    """Input the user can mend; shown without a traceback."""


def progress_bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def reporter(bar: Progress) -> Callable[[str, int, int], None]:
    """(stage, done, total) -> one bar per stage; a total of 0 is unknown."""
    tasks: dict[str, Any] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=total or None)
        bar.update(tasks[stage], completed=done, total=total or None)

    return report


def write_text(path: Path, text: str) -> None:
    stage = path.with_name(f".{path.name}.tmp")
    stage.write_text(text, encoding="utf-8")
    stage.replace(path)


def to_json(value: Any) -> str:
    """Indented JSON. NaN and infinity, which JSON does not have, become null."""
    return json.dumps(_finite(value), indent=2, allow_nan=False) + "\n"


def print_json(value: Any) -> None:
    print(to_json(value), end="")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
