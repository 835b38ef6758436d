"""Runs untrusted Python in a child process with no network, hardly any file system, and bounded time and memory.

Layers, outermost first; a result names those that were in force:

- ``namespaces``: own user, network, IPC and PID namespaces (no interface but a dead loopback);
- ``landlock``: the interpreter and its libraries are read-only, a fresh temporary folder is writable, nothing else can
  be opened (Linux 5.13, landlock(7));
- ``seccomp``: sockets, new processes, signals, ptrace, mounts, keyrings and the like end in EPERM (seccomp(2));
- ``limits``: CPU time, memory, file size, open files (setrlimit(2)); no new privileges; empty environment.

Wall-clock time and output are bounded from outside, and the whole process group is killed at the end. Code is never run
without ``limits`` and a layer that shuts off the network, unless the caller asks for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Status = Literal["ok", "error", "timeout", "memory", "output_limit", "refused"]
_CHILD = Path(__file__).with_name("child.py")


@dataclass(frozen=True)
class Limits:
    """Bounds on one run."""

    seconds: float = 5.0  # wall clock; CPU time is bounded to the same, rounded up
    memory_bytes: int = 512 << 20
    output_bytes: int = 64 << 10
    file_bytes: int = 16 << 20


@dataclass(frozen=True)
class SandboxResult:
    """``ok``: exit status 0. ``error``: any other end; ``stderr`` has the traceback. ``refused``: no isolation here."""

    status: Status
    stdout: str
    stderr: str
    seconds: float
    layers: tuple[str, ...]


def run(code: str, *, stdin: str = "", limits: Limits | None = None, allow_weaker: bool = False) -> SandboxResult:
    """Execute ``code`` as a script.

    Args:
        code: Python source; runs isolated (``python -I -S``) with only the standard library.
        stdin: what it reads from standard input.
        allow_weaker: run even where neither a network namespace nor seccomp can be had.
    """
    limits = limits or Limits()
    folder = tempfile.mkdtemp(prefix="fastsft-sandbox-")
    try:
        return _run(code, stdin, limits, allow_weaker, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_all(codes: Sequence[str], *, workers: int = 2, limits: Limits | None = None) -> list[SandboxResult]:
    """Several scripts, ``workers`` at a time; results in order."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda code: run(code, limits=limits), codes))


def _run(code: str, stdin: str, limits: Limits, allow_weaker: bool, folder: str) -> SandboxResult:
    settings = {
        "folder": folder,
        "seconds": limits.seconds,
        "memory": limits.memory_bytes,
        "file": limits.file_bytes,
        "weaker": allow_weaker,
        "readable": _readable(),
    }
    report, write_end = os.pipe()
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(_CHILD), json.dumps(settings), str(write_end)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder,
        env={},
        pass_fds=(write_end,),
        start_new_session=True,
    )
    os.close(write_end)
    try:
        request = json.dumps({"code": code, "stdin": stdin}).encode()
        status, stdout, stderr = _communicate(process, request, began + limits.seconds + _STARTUP, limits.output_bytes)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
    with os.fdopen(report, "rb") as pipe:
        layers = tuple(pipe.read(4096).decode().split())
    seconds = time.monotonic() - began
    if "refused" in layers:
        return SandboxResult("refused", "", "no layer that shuts off the network is available here", seconds, ())
    if status is None:
        status = _status_of(process.returncode, stderr)
    return SandboxResult(status, stdout, stderr, seconds, layers)


_STARTUP = 1.0  # seconds of wall clock granted for starting the interpreter


def _communicate(
    process: subprocess.Popen[bytes], request: bytes, deadline: float, limit: int
) -> tuple[Status | None, str, str]:
    """Feed and read the child until it closes its pipes, the deadline passes or it has written too much."""
    if process.stdin is None or process.stdout is None or process.stderr is None:
        raise RuntimeError("sandbox: the child has no pipes")
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(request)
        process.stdin.close()
    streams = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    out, err = streams.values()
    open_files = set(streams)
    status: Status | None = None
    while open_files:
        ready, _, _ = select.select(list(open_files), [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            status = "timeout"
            break
        for file in ready:
            data = os.read(file, 65536)
            if not data:
                open_files.discard(file)
            streams[file] += data
        if len(out) + len(err) > limit:
            status = "output_limit"
            break
    if status is None:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            status = "timeout"
    return status, out[:limit].decode("utf-8", "replace"), err[:limit].decode("utf-8", "replace")


def _status_of(returncode: int, stderr: str) -> Status:
    # With a PID namespace the interpreter is the child of a supervisor, which passes a signal on as 128 + number.
    if returncode in (-signal.SIGXCPU, 128 + signal.SIGXCPU, -signal.SIGKILL, 128 + signal.SIGKILL):
        return "timeout"
    if returncode == 0:
        return "ok"
    return "memory" if "MemoryError" in stderr[-400:] else "error"


def _readable() -> list[str]:
    """What the interpreter itself needs: its libraries, wherever they are installed."""
    roots = [sys.base_prefix, sys.prefix, "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null",
             "/dev/urandom", "/dev/zero", str(_CHILD)]  # fmt: skip
    return sorted({os.path.realpath(p) for p in roots if os.path.exists(p)})
