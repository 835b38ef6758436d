"""What takes long: who is told how far it is, and bars on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total) now and then; a total of 0 is unknown."""


@contextmanager
def bars(enabled: bool = True) -> Iterator[Progress]:
    """One bar per stage on stderr, if that is a terminal: what is done, how much of it a second, and how long the rest
    will take."""
    if not (enabled and sys.stderr.isatty()):
        yield lambda stage, done, total: None
        return
    from rich import progress as rich_progress
    from rich.console import Console
    from rich.text import Text

    class Rate(rich_progress.ProgressColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:,.0f}/s" if speed else "")

    console = Console(stderr=True)
    columns = (
        rich_progress.TextColumn("{task.description}"), rich_progress.BarColumn(), rich_progress.MofNCompleteColumn(),
        Rate(), rich_progress.TimeRemainingColumn(),
    )  # fmt: skip
    tasks: dict[str, Any] = {}
    with rich_progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage)
            bar.update(tasks[stage], completed=done, total=total or None)

        yield tell
