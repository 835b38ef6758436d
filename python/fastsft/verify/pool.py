"""Supervisors, started when they are needed and kept for the next run; a run has one for itself."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastsft.verify.isolation import NOBODY, USER
from fastsft.verify.supervisor import receive, send

# An import rather than a script, whose bytecode would not be cached. The stand-in for the package keeps its __init__,
# and with it torch, from being imported.
_START = (
    "import sys; package = type(sys)('fastsft'); package.__path__ = [sys.argv[1]]; sys.modules['fastsft'] = package; "
    "from fastsft.verify import supervisor; supervisor.main(int(sys.argv[2]))"
)


class SupervisorError(Exception):
    """It could not be started, or ended."""


class Supervisor:
    """A process of ``supervisor.py``, for runs that may read ``readable``.

    Raises:
        SupervisorError: with what the process said.
    """

    def __init__(self, readable: Sequence[str]) -> None:
        self._outer = tempfile.mkdtemp(prefix="fastsft-sandbox-")
        os.mkdir(os.path.join(self._outer, "root"))
        self._connection, other = socket.socketpair()
        try:
            with other:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _START, str(Path(__file__).parents[1]), str(other.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    cwd="/",
                    env={},
                    pass_fds=(other.fileno(),),
                    start_new_session=True,  # Ctrl-C is for this process, which then closes the connection
                )
            message = self._call({"outer": self._outer, "readable": list(readable)})
            if message.get("map"):
                message = self._call({"mapped": _map_users(self._process.pid)})
        except BaseException:
            self.close()
            raise
        if message["root"]:  # it has left this folder's file system
            shutil.rmtree(self._outer, ignore_errors=True)

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Raises SupervisorError: the process ended (short of memory, say)."""
        return self._call(request)

    def _call(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            send(self._connection, message)
            reply = receive(self._connection)
        except ConnectionError:
            reply = None
        if reply is None:
            said = self._process.communicate()[1].decode("utf-8", "replace").strip().splitlines()
            raise SupervisorError(said[-1] if said else f"it ended with status {self._process.returncode}")
        return reply

    def close(self) -> None:
        self._connection.close()  # which ends it
        with contextlib.suppress(AttributeError):  # it was never started
            self._process.wait()
            if self._process.stderr:
                self._process.stderr.close()
        shutil.rmtree(self._outer, ignore_errors=True)


def _map_users(pid: int) -> bool:
    """Two users for the namespace of a process that root started: its own, who sets up, and nobody, who runs code."""
    if not os.stat(os.__file__).st_mode & stat.S_IROTH:  # an interpreter that only root can read
        return False
    try:
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{pid}/{name}", "w") as file:
                file.write(f"0 0 1\n{USER} {NOBODY} 1\n")
    except OSError:  # root of a container without the right to
        return False
    return True


class _Pool:
    """Idle supervisors by what they may read. A process forked from this one starts its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[Any, list[Supervisor]] = {}

    @contextlib.contextmanager
    def lease(self, readable: Sequence[str]) -> Iterator[Supervisor]:
        key = (_START, tuple(readable))
        with self._lock:
            idle = self._idle.setdefault(key, [])
            supervisor = idle.pop() if idle else None
        supervisor = supervisor or Supervisor(readable)
        try:
            yield supervisor
        except BaseException:
            supervisor.close()
            raise
        with self._lock:
            self._idle.setdefault(key, []).append(supervisor)

    def close(self) -> None:
        """End the idle ones."""
        with self._lock:
            for idle in self._idle.values():
                while idle:
                    idle.pop().close()


POOL = _Pool()
os.register_at_fork(after_in_child=POOL.__init__)  # type: ignore[misc]  # a lock that a thread held stays locked there
atexit.register(POOL.close)
