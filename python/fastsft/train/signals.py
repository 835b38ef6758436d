"""SIGTERM and SIGINT during a run: the step they come in is finished and saved; a second one acts at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class Signals:
    """Context in which ``number`` becomes the signal that came. Does nothing outside the main thread.

    Args:
        announce: tell on the terminal that the step is being finished.
    """

    def __init__(self, *, announce: bool) -> None:
        self.number: int | None = None
        self._announce = announce
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            if handler is not None:  # not one that Python installed, and can install again
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if self._announce:  # not through the display: it may be what was interrupted
            os.write(2, b"\nfinishing the step and saving it; once more to stop at once\n")
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
