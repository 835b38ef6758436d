"""Garbage collection in a long run."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def settling() -> Iterator[Callable[[], None]]:
    """What to call when all that lives now lives to the end: full collections, 0.1 s each, then pass it over.

    Python can only thaw everything. So where a caller has frozen objects nothing is frozen or thawed here.
    """
    free = gc.get_freeze_count() == 0

    def settle() -> None:
        gc.collect()
        if free:
            gc.freeze()

    try:
        yield settle
    finally:
        if free:
            gc.unfreeze()
