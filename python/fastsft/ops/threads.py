"""How many threads the native kernels of this process use."""

from __future__ import annotations

from fastsft import _C


def set_num_threads(count: int) -> None:
    """``count`` threads, the caller included, from the next call on. A forked process has one until it asks for more.

    Raises:
        ValueError: fewer than one.
    """
    _C.set_num_threads(count)
