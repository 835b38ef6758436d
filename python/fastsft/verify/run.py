"""One run seen from outside the sandbox: its child is watched and ended, and what came of it is judged.

Part of ``supervisor.py``'s process: standard library only.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from typing import Any

_STARTUP = 30.0  # seconds for a child to lock itself in, on a busy machine
_SIGNS_OF_NO_MEMORY = ("bad_alloc", "MemoryError", "OutOfMemoryError", "out of memory", "Cannot allocate memory")


@dataclass
class Run:
    """A forked child, and what came out of it. ``started`` is when it reported its layers; ``status`` is set if it was
    stopped."""

    pid: int
    out_pipe: int
    err_pipe: int
    report_pipe: int
    out: bytearray = field(default_factory=bytearray)
    err: bytearray = field(default_factory=bytearray)
    report: bytearray = field(default_factory=bytearray)
    started: float | None = None
    ended: float = 0.0
    status: str | None = None
    code: int = 0
    cpu: float = 0.0

    def watch(self, connection: socket.socket, request: dict[str, Any]) -> None:
        """Until the child has ended or had to be."""
        ending = os.pidfd_open(self.pid)
        try:
            self._collect(ending, connection, request)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            _, status, usage = os.wait4(self.pid, 0)
            self.ended = time.monotonic()
            self.code, self.cpu = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
            self._drain(request["output"])
            for descriptor in (ending, self.out_pipe, self.err_pipe, self.report_pipe):
                os.close(descriptor)

    def _kept(self) -> dict[int, bytearray]:
        return {self.out_pipe: self.out, self.err_pipe: self.err, self.report_pipe: self.report}

    def _collect(self, ending: int, connection: socket.socket, request: dict[str, Any]) -> None:
        kept, poll = self._kept(), select.poll()
        for descriptor in (*kept, ending, connection.fileno()):
            poll.register(descriptor, select.POLLIN)
        deadline = time.monotonic() + _STARTUP
        while True:
            ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000 + 1)
            if not ready and time.monotonic() >= deadline:
                self.status = "timeout"
                return
            for descriptor, _ in ready:
                if descriptor == connection.fileno():  # one request at a time: this is the end of the other side
                    sys.exit(0)
                if descriptor == ending:
                    return
                data = os.read(descriptor, 65536)
                if not data or len(self.report) > 4096:
                    poll.unregister(descriptor)
                kept[descriptor].extend(data)
            if self.started is None and b"\n" in self.report:
                self.started = time.monotonic()
                deadline = self.started + request["seconds"]
            if len(self.out) + len(self.err) > request["output"]:
                self.status = "output_limit"
                return

    def _drain(self, most: int) -> None:
        """What is still in the pipes; a process that escaped the kill could hold them open, so until nothing comes."""
        for descriptor, kept in self._kept().items():
            os.set_blocking(descriptor, False)
            with contextlib.suppress(BlockingIOError):
                while len(kept) <= most + 4096 and (data := os.read(descriptor, 65536)):
                    kept.extend(data)
        if self.started is None and b"\n" in self.report:
            self.started = self.ended
        if self.status is None and len(self.out) + len(self.err) > most:
            self.status = "output_limit"

    def result(self, request: dict[str, Any]) -> dict[str, Any]:
        most, secret = request["output"], request["secret"]
        kept = self.out[:most], self.err[: max(0, most - len(self.out))]
        stdout, stderr = (data.decode("utf-8", "replace") for data in kept)
        first, _, rest = self.report.decode("ascii", "replace").partition("\n")
        if self.started is None or first == "refused":
            why = _why_refused(request) if self.started else f"could not start: {stderr}"
            return refused(why)
        *layers, began = first.split()
        verdicts = [line.removeprefix(secret).split() for line in rest.splitlines() if line.startswith(secret)]
        verdict = verdicts[0] if verdicts else [""]
        status = self.status
        if status is None and "argv" in request:
            status, said = _end_of_command(verdict, self.code, stderr, request)
            stderr += said
        elif status is None:
            status = _end_of_python(verdict[0], self.code, self.cpu, request["seconds"])
            if status == "ok" and request["check"] and verdict[0] != "ok":
                status = "error"
                stderr += "exited before its check was done\n"
        seconds = self.ended - float(began)
        return {"status": status, "stdout": stdout, "stderr": stderr, "seconds": seconds, "layers": layers}


def refused(why: str) -> dict[str, Any]:
    return {"status": "refused", "stdout": "", "stderr": why, "seconds": 0.0, "layers": ()}


def _why_refused(request: dict[str, Any]) -> str:
    if "argv" in request:
        return "programs that may start processes need namespaces of their own, which this machine does not allow"
    return "no layer that shuts off the network is available here"


def _end_of_python(verdict: str, code: int, cpu: float, seconds: float) -> str:
    if code == 0:
        return "ok"
    if code == -signal.SIGXCPU or (code == -signal.SIGKILL and cpu >= seconds):
        return "timeout"  # process 1 ignores the first and dies of the hard limit
    if code == -signal.SIGSYS:
        return "violation"
    if code == -signal.SIGKILL:  # nobody else kills it but the kernel, short of memory
        return "memory"
    return verdict if verdict in ("memory", "violation", "wrong", "compile_error") else "error"


def _end_of_command(verdict: list[str], code: int, stderr: str, request: dict[str, Any]) -> tuple[str, str]:
    """The status, and what to say on top of what the command said."""
    if verdict[0] == "exec":
        why = f"{request['argv'][0]}: {' '.join(verdict[1:])}\n"
        return ("error" if request.get("from_built") else "refused"), why
    if verdict[0] != "exit":  # process 1 itself was killed
        return "memory", ""
    code, most_resident, cpu = int(verdict[1]), int(verdict[2]), float(verdict[3])
    if code == 0:
        return "ok", ""
    if code == -signal.SIGSYS:
        return "violation", "made a forbidden system call\n"
    if code == -signal.SIGXCPU or (code == -signal.SIGKILL and cpu >= request["seconds"]):
        return "timeout", ""
    if most_resident > 0.9 * request["memory"] or any(sign in stderr for sign in _SIGNS_OF_NO_MEMORY):
        return "memory", ""
    ended = f"ended by {signal.Signals(-code).name}\n" if code < 0 else f"exit status {code}\n"
    return "error", ended
