"""One process per output folder: a second one would remove what the first is writing."""

from __future__ import annotations

import errno
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
    while True:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ConfigError(f"{name}: expected a folder, got {output}, which is or lies in a file") from None
        try:
            stream = open(output / ".lock", "a+")  # noqa: SIM115
        except FileNotFoundError:  # the holder has just removed the folder
            continue
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.seek(0)
                raise ConfigError(
                    f"{name}: {output} is in use by another run (process {stream.read() or 'unknown'}); "
                    "wait for it, or choose another folder"
                ) from None
            if os.fstat(stream.fileno()).st_nlink == 0:  # locked after its holder removed it: others lock a new one
                continue
            stream.truncate(0)
            stream.write(str(os.getpid()))
            stream.flush()
            yield
            return


def remove_held(folder: Path) -> None:
    """Remove the lock of a folder that this process holds, and the folder unless something else is in it."""
    (folder / ".lock").unlink()
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
            raise
