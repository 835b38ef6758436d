"""Runs untrusted Python in a child process with no network, hardly any file system, and bounded time and memory.

Layers, outermost first; a result names those that were in force:

- ``namespaces``: own user, network, IPC, PID and mount namespaces (no interface but a dead loopback);
- ``root``: a root with nothing in it but the interpreter's libraries, read-only, and a small folder in memory;
- ``landlock``: the same by rule: the libraries may be read, the folder written, nothing else opened (landlock(7));
- ``seccomp``: sockets, new processes, signals to others, ptrace, mounts, keyrings and the like end in EPERM
  (seccomp(2));
- ``limits``: CPU time, memory, file size, open files (setrlimit(2)); no capabilities, no new privileges; empty
  environment.

Wall-clock time and output are bounded from outside, and the whole process group is killed at the end. Code is never
run without ``limits`` and a layer that shuts off the network, unless the caller asks for it. Root or not makes no
difference where user namespaces are allowed; in a container that forbids them, ``landlock`` and ``seccomp`` remain.

A check runs beside the code it checks: code that exits early or writes to every descriptor does not pass, but code
written to deceive, which searches the interpreter for its check, can.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

Status = Literal["ok", "error", "timeout", "memory", "output_limit", "refused"]
# An import rather than a script, whose bytecode would not be cached. The stand-in for the package keeps its __init__,
# and with it torch, from being imported.
_START = (
    "import sys; package = type(sys)('fastsft'); package.__path__ = [sys.argv[1]]; sys.modules['fastsft'] = package; "
    "from fastsft.verify import child; child.main()"
)
_STARTUP = 30.0  # seconds for the interpreter to start and lock itself in, on a busy machine


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

    def __post_init__(self) -> None:
        for name in ("seconds", "memory_bytes", "output_bytes", "file_bytes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**62:
                raise ValueError(f"Limits: {name}: expected a number above 0, got {value!r}")


@dataclass(frozen=True)
class SandboxResult:
    """How a run ended.

    ``status`` is ``ok`` (exit status 0, check passed), ``error`` (any other end of the code's own; ``stderr`` has the
    traceback), ``timeout``, ``memory``, ``output_limit``, or ``refused``: the code was not run; ``stderr`` says why.
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
    limits = limits or Limits()
    outer = tempfile.mkdtemp(prefix="fastsft-sandbox-")
    try:
        request: dict[str, Any] = {
            "code": code,
            "check": check,
            "stdin": stdin,
            "secret": secrets.token_hex(16),
            "root": os.path.join(outer, "root"),
            "folder": os.path.join(outer, "work"),
            "readable": _readable(),
            "seconds": limits.seconds,
            "memory": int(limits.memory_bytes),
            "file": int(limits.file_bytes),
            "weaker": allow_weaker,
            "parent": os.getpid(),
        }
        os.mkdir(request["root"])
        os.mkdir(request["folder"])
        return _run(request, limits)
    finally:
        _remove(outer)


@dataclass
class _Collected:
    """What came out of the child. ``started`` is when it reported its layers; ``status`` is set if it was stopped."""

    report: bytearray = field(default_factory=bytearray)
    out: bytearray = field(default_factory=bytearray)
    err: bytearray = field(default_factory=bytearray)
    started: float | None = None
    status: Status | None = None


def _run(request: dict[str, Any], limits: Limits) -> SandboxResult:
    report, write_end = os.pipe()
    with os.fdopen(report, "rb", buffering=0) as pipe, tempfile.TemporaryFile() as file:
        try:
            file.write(json.dumps({**request, "report": write_end}).encode())
            file.seek(0)
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _START, str(Path(__file__).parents[1])],
                stdin=file,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=request["folder"],
                env={},
                pass_fds=(write_end,),
                start_new_session=True,
            )
        finally:
            os.close(write_end)
        with process:
            try:
                got = _collect(process, pipe, limits)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            ended = time.monotonic()
            _wait_for_end(pipe, got)
    return _result(got, process.returncode, request, limits, ended)


def _collect(process: subprocess.Popen[bytes], pipe: IO[bytes], limits: Limits) -> _Collected:
    """Read the child until it closes its pipes, the deadline passes or it has written too much."""
    got = _Collected()
    deadline = time.monotonic() + _STARTUP
    with selectors.DefaultSelector() as selector:
        for stream, kept in ((process.stdout, got.out), (process.stderr, got.err), (pipe, got.report)):
            if stream is None:
                raise RuntimeError("sandbox: the child has no pipes")
            selector.register(stream, selectors.EVENT_READ, kept)
        while selector.get_map():
            events = selector.select(max(0.0, deadline - time.monotonic()))
            if not events:
                got.status = "timeout"
                return got
            for key, _ in events:
                data = os.read(key.fd, 65536)
                if not data or len(got.report) > 4096:
                    selector.unregister(key.fileobj)
                key.data.extend(data)
            if got.started is None and b"\n" in got.report:
                got.started = time.monotonic()
                deadline = got.started + limits.seconds
            if len(got.out) + len(got.err) > limits.output_bytes:
                got.status = "output_limit"
                return got
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        got.status = "timeout"
    return got


def _wait_for_end(pipe: IO[bytes], got: _Collected) -> None:
    """A killed process inside the namespaces dies a moment after the one that was waited for; its end of the pipe
    closes then, and the folder can go."""
    deadline = time.monotonic() + 1.0
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())):
            data = os.read(pipe.fileno(), 4096)
            if not data:
                return
            got.report.extend(data)


def _result(got: _Collected, code: int, request: dict[str, Any], limits: Limits, ended: float) -> SandboxResult:
    kept = got.out[: limits.output_bytes], got.err[: max(0, limits.output_bytes - len(got.out))]
    stdout, stderr = (data.decode("utf-8", "replace") for data in kept)
    layers, _, rest = got.report.decode("ascii", "replace").partition("\n")
    if got.started is None or layers == "refused":
        why = "no layer that shuts off the network is available here" if got.started else f"could not start: {stderr}"
        return SandboxResult("refused", "", why, 0.0, ())
    verdicts = [
        line.removeprefix(request["secret"]) for line in rest.splitlines() if line.startswith(request["secret"])
    ]
    verdict = verdicts[0].strip() if verdicts else ""
    status = got.status or _status_of(code, verdict)
    if status == "ok" and request["check"] and verdict != "ok":
        status = "error"
        stderr += "exited before its check was done\n"
    return SandboxResult(status, stdout, stderr, ended - got.started, tuple(layers.split()))


def _status_of(code: int, verdict: str) -> Status:
    if code == 0:
        return "ok"
    if verdict == "memory" or code == -signal.SIGKILL:  # nobody else kills it but the kernel, short of memory
        return "memory"
    return "timeout" if code == -signal.SIGXCPU else "error"


def _remove(folder: str) -> None:
    """Delete the folder, whatever the code did to it."""
    try:
        shutil.rmtree(folder)
    except (OSError, RecursionError):  # it took permissions away, or nested folders in folders by the thousand
        for command in (["chmod", "-R", "u+rwX", folder], ["rm", "-rf", folder]):
            subprocess.run(command, stderr=subprocess.DEVNULL, check=False)


def _readable() -> list[str]:
    """What the interpreter itself needs: its libraries, wherever they are installed."""
    roots = [f"{sys.base_prefix}/lib", f"{sys.base_prefix}/lib64", os.path.dirname(os.__file__), "/usr/lib",
             "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo", "/etc/localtime",
             "/dev/urandom", "/dev/random", "/dev/zero"]  # fmt: skip
    return sorted({path for root in roots if os.path.exists(root) for path in (root, os.path.realpath(root))})
