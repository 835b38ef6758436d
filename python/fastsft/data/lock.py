"""One process per output folder: a second one would remove what the first is writing."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastsft.config import ConfigError


@contextmanager
def hold(output: Path, name: str = "output") -> Iterator[None]:
    """Lock ``<output>/.lock``, creating both; ``name`` is what messages call it. The kernel lets go of it when the
    process ends, however it ends.

    Raises:
        ConfigError: another process has it, or ``output`` cannot be a folder.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"{name}: expected a folder, got {output}, which is or lies in a file") from None
    # The file stays: removing it would let a third process lock a new one while a second still waits on the old.
    with open(output / ".lock", "a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            raise ConfigError(
                f"{name}: {output} is in use by another run (process {stream.read() or 'unknown'}); "
                "wait for it, or choose another folder"
            ) from None
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield
