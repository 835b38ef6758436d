"""The sandbox's fork server: an interpreter that is up, walled in and preloaded, and forks a locked-in child per run.

Started by ``pool.py`` with one end of a socket. A request and its reply are each a JSON object behind its length. One
run at a time; the supervisor forks, bounds the wall clock and the output, kills what is left and clears the folder.
It ends when the other end of the socket is closed, and its child with it. Standard library only (``-I -S``).
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import resource
import select
import shutil
import signal
import socket
import stat
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from fastsft.verify import child, isolation

# What answers import most, so that no run pays for it. Nothing that starts a thread or opens a file.
_PRELOADED = (
    "abc", "bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "enum", "fractions", "functools",
    "hashlib", "heapq", "io", "itertools", "linecache", "math", "operator", "queue", "random", "re", "statistics",
    "string", "textwrap", "threading", "traceback", "typing",
)  # fmt: skip
_STARTUP = 30.0  # seconds for a child to lock itself in, on a busy machine
_SIGNS_OF_NO_MEMORY = ("bad_alloc", "MemoryError", "OutOfMemoryError", "out of memory", "Cannot allocate memory")


def receive(connection: socket.socket) -> dict[str, Any] | None:
    """The next message; None at the end."""
    head = _exactly(connection, 8)
    body = head and _exactly(connection, int.from_bytes(head, "little"))
    return json.loads(body) if body else None


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    body = json.dumps(message).encode()
    connection.sendall(len(body).to_bytes(8, "little") + body)


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = connection.recv(min(size - len(data), 1 << 20))
        if not part:
            return b""
        data += part
    return bytes(data)


def main(descriptor: int) -> None:
    """Serve until the other end closes. Returns in each forked child too, after its run's code ended normally."""
    job = _Server(socket.socket(fileno=descriptor)).serve()
    if job is not None:
        child.main(job)


class _Server:
    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        setup = receive(connection) or sys.exit(1)
        self.outer: str = setup["outer"]
        self.folder, self.built = os.path.join(self.outer, "work"), os.path.join(self.outer, "built")
        for name in _PRELOADED:
            __import__(name)
        os.umask(0o022)
        with open("/proc/self/statm") as file:
            self.taken = int(file.read().split()[0]) * resource.getpagesize()
        self.layers = ["limits"]
        self.namespaces, self.other_user = isolation.enter_namespaces(self._ask_for_mapping)
        self.root = False
        if self.namespaces:
            self.layers.append("namespaces")
            root = os.path.join(self.outer, "root")
            self.root = isolation.enter_private_root(root, [self.folder, self.built], setup["readable"])
        self.other_user &= self.root  # elsewhere it could not reach its own folder
        if self.root:
            self.layers.append("root")
        if self.other_user or os.getuid() != 0:
            self.layers.append("processes")
        send(connection, {"ready": True, "root": self.root})
        gc.collect()
        gc.freeze()

    def _ask_for_mapping(self) -> bool:
        send(self.connection, {"map": True})
        return bool((receive(self.connection) or {}).get("mapped"))

    def serve(self) -> child.Job | None:
        while request := receive(self.connection):
            job = self._run(request)
            if job is not None:
                return job
        return None

    # --- one run ------------------------------------------------------------------------------------------------------

    def _run(self, request: dict[str, Any]) -> child.Job | None:
        self._open_folder(request)
        try:
            stdin = _file_in_memory(request["stdin"])
            pipes = [os.pipe() for _ in range(3)]
            pid = isolation.fork(own_processes=self.namespaces)
            if pid == 0:
                return self._become_child(request, stdin, pipes)
            os.close(stdin)
            for _, end in pipes:
                os.close(end)
            run = _Run(pid, pipes[0][0], pipes[1][0], pipes[2][0])
            run.watch(self.connection, request)
        except OSError as error:
            reply = _refused(f"could not start: {error}")
        else:
            reply = run.result(request)
        self._close_folder(keep=request.get("keep", False) and reply["status"] == "ok")
        send(self.connection, reply)
        return None

    def _become_child(self, request: dict[str, Any], stdin: int, pipes: list[tuple[int, int]]) -> child.Job:
        isolation.die_with_parent()
        os.setsid()
        (_, out), (_, err), (_, report) = pipes
        for source, target in ((stdin, 0), (out, 1), (err, 2)):
            os.dup2(source, target)
        os.closerange(3, report)
        os.closerange(report + 1, 4096)
        self.connection.detach()
        # The streams that it started with have looked at other files.
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), "utf-8", "surrogateescape")
        sys.stdout, sys.stderr = _writer(1, "surrogateescape"), _writer(2, "backslashreplace", line_buffering=True)
        sys.modules["random"].seed()  # or all runs would draw the same numbers
        return child.Job(request, self.folder, list(self.layers), self.other_user, report, self.taken)

    def _open_folder(self, request: dict[str, Any]) -> None:
        if self.root:
            isolation.mount_memory(self.folder, request["file"], isolation.USER)
        else:
            os.mkdir(self.folder, 0o700)
        if request.get("from_built"):
            _copy(self.built, self.folder)
        for name, text in request.get("files", {}).items():
            with open(os.path.join(self.folder, name), "w", encoding="utf-8", errors="surrogatepass") as file:
                file.write(text)
        if self.other_user:
            for path, folders, files in os.walk(self.folder):
                for name in (*folders, *files):
                    os.chown(os.path.join(path, name), isolation.USER, isolation.USER, follow_symlinks=False)

    def _close_folder(self, *, keep: bool) -> None:
        """With ``keep``, as what later runs of the same lease find with ``from_built``."""
        if keep:
            self._clear(self.built)
        if not self.root:
            if keep:
                os.rename(self.folder, self.built)
            else:
                remove(self.folder)
        elif keep:
            isolation.move_mount(self.folder, self.built)
        else:
            isolation.unmount(self.folder)

    def _clear(self, folder: str) -> None:
        if not self.root:
            remove(folder)
        elif os.path.ismount(folder):
            isolation.unmount(folder)


@dataclass
class _Run:
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
            return _refused(why)
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


def _refused(why: str) -> dict[str, Any]:
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


def remove(folder: str) -> None:
    """Delete the folder, whatever the code did to it."""
    import subprocess

    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except (OSError, RecursionError):  # it took permissions away, or nested folders in folders by the thousand
        for command in (["chmod", "-R", "u+rwX", folder], ["rm", "-rf", folder]):
            subprocess.run(command, stderr=subprocess.DEVNULL, check=False)


def _writer(descriptor: int, errors: str, *, line_buffering: bool = False) -> io.TextIOWrapper:
    raw = io.BufferedWriter(io.FileIO(descriptor, "w", closefd=False))
    return io.TextIOWrapper(raw, "utf-8", errors, line_buffering=line_buffering)


def _file_in_memory(text: str) -> int:
    file = os.memfd_create("stdin")
    with open(file, "wb", closefd=False) as stream:
        stream.write(text.encode("utf-8", "surrogatepass"))
    os.lseek(file, 0, os.SEEK_SET)
    return file


def _copy(source: str, target: str) -> None:
    """Files, folders and links as links. Anything else that a compiler left there, such as a pipe, stays behind."""

    def special(folder: str, names: list[str]) -> list[str]:
        kinds = ((name, os.lstat(os.path.join(folder, name)).st_mode) for name in names)
        return [name for name, mode in kinds if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode))]

    shutil.copytree(source, target, symlinks=True, ignore=special, dirs_exist_ok=True)
