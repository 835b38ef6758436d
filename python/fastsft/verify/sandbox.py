"""Runs untrusted code in a child process with no network, hardly any file system, and bounded time and memory.

Layers, outermost first; a result names those that were in force:

- ``namespaces``: own user, network, IPC, PID and mount namespaces (no interface but a dead loopback);
- ``root``: a root with nothing in it but the interpreter's libraries, read-only, and a small folder in memory;
- ``landlock``: the same by rule: the libraries may be read, the folder written, nothing else opened (landlock(7));
- ``processes``: their number is bounded (the code is somebody whose processes the kernel counts);
- ``seccomp``: sockets, new processes, signals to others, keyrings and the like end in EPERM, ptrace, mounts and
  namespaces end the process (seccomp(2));
- ``limits``: CPU time, memory, file size, open files (setrlimit(2)); no capabilities, no new privileges; empty
  environment.

Wall-clock time and output are bounded from outside, and all that it started is killed at the end. Code is never
run without ``limits`` and a layer that shuts off the network, unless the caller asks for it. Root or not makes no
difference where user namespaces are allowed; in a container that forbids them, ``landlock`` and ``seccomp`` remain.

A check runs beside the code it checks: code that exits early or writes to every descriptor does not pass, but code
written to deceive, which searches the interpreter for its check, can.
"""

from __future__ import annotations

import functools
import os
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastsft.verify.pool import POOL, Supervisor, SupervisorError

Status = Literal["ok", "wrong", "error", "timeout", "memory", "compile_error", "output_limit", "violation", "refused"]


@dataclass(frozen=True)
class Limits:
    """Bounds on one run.

    Raises:
        ValueError: a limit that is not above 0.
    """

    seconds: float = 5.0  # wall clock, from the code's first line; CPU time is bounded to the same, rounded up
    memory_bytes: int = 512 << 20  # address space
    output_bytes: int = 64 << 10  # standard output and error together
    file_bytes: int = 16 << 20  # one file; with a root of its own, all files together
    processes: int = 64  # and threads, where the layer "processes" is in force

    def __post_init__(self) -> None:
        for name in ("seconds", "memory_bytes", "output_bytes", "file_bytes", "processes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**62:
                raise ValueError(f"Limits: {name}: expected a number above 0, got {value!r}")


@dataclass(frozen=True)
class SandboxResult:
    """How a run ended.

    ``status`` is ``ok`` (exit status 0, check passed), ``wrong`` (the check's assertion failed, or the output is not
    the expected one), ``compile_error``, ``timeout``, ``memory``, ``output_limit``, ``violation`` (ended by what the
    sandbox denied), ``error`` (any other end of the code's own; ``stderr`` has the traceback), or ``refused``: the code
    was not run; ``stderr`` says why.
    ``seconds`` is the wall-clock time of the code without the interpreter's start.
    """

    status: Status
    stdout: str
    stderr: str
    seconds: float
    layers: tuple[str, ...]


def run(
    code: str, *, check: str = "", stdin: str = "", limits: Limits | None = None, allow_weaker: bool = False
) -> SandboxResult:
    """Execute ``code`` as a script.

    Args:
        code: Python source; runs isolated (``python -I -S``) with only the standard library.
        check: source executed after it in the same module. The run is then ``ok`` only if the check reaches its end: an
            exit before that, whatever its status, is an error.
        stdin: what the code reads from standard input.
        allow_weaker: run even where neither a network namespace nor seccomp can be had.
    """
    given, readable = {"code": code, "check": check}, interpreter_paths()
    try:
        with POOL.lease(readable) as supervisor:
            return run_in(supervisor, given, readable, stdin=stdin, limits=limits, allow_weaker=allow_weaker)
    except SupervisorError as error:
        return refused(error)


def refused(error: SupervisorError) -> SandboxResult:
    return SandboxResult("refused", "", f"could not start: {error}", 0.0, ())


def run_in(
    supervisor: Supervisor,
    given: dict[str, Any],
    readable: Sequence[str],
    *,
    stdin: str = "",
    limits: Limits | None = None,
    allow_weaker: bool = False,
) -> SandboxResult:
    """One run of ``code`` and ``check``, or of ``argv`` with ``files``, in a supervisor that is leased."""
    limits = limits or Limits()
    reply = supervisor.run({
        **given,
        "stdin": stdin,
        "secret": secrets.token_hex(16),
        "readable": list(readable),
        "seconds": limits.seconds,
        "memory": int(limits.memory_bytes),
        "output": int(limits.output_bytes),
        "file": int(limits.file_bytes),
        "processes": int(limits.processes),
        "weaker": allow_weaker,
    })  # fmt: skip
    return SandboxResult(reply["status"], reply["stdout"], reply["stderr"], reply["seconds"], tuple(reply["layers"]))


@functools.cache
def interpreter_paths() -> list[str]:
    """What the interpreter itself needs: its libraries, wherever they are installed."""
    roots = [f"{sys.base_prefix}/lib", f"{sys.base_prefix}/lib64", os.path.dirname(os.__file__), "/usr/lib",
             "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo", "/etc/localtime",
             "/dev/urandom", "/dev/random", "/dev/zero"]  # fmt: skip
    return _existing(roots)


@functools.cache
def system_paths(more: tuple[str, ...] = ()) -> list[str]:
    """What commands need: the system's programs and libraries, and ``more``."""
    return _existing([*interpreter_paths(), "/usr", "/bin", "/lib", "/lib64", "/etc/alternatives", *more])


def _existing(roots: Sequence[str]) -> list[str]:
    """With the targets of links, without what lies inside another one."""
    paths = {path for root in roots if os.path.exists(root) for path in (root, os.path.realpath(root))}
    return sorted(p for p in paths if not any(p.startswith(f"{q}/") for q in paths))
