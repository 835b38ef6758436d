"""The sandbox's fork server: an interpreter that is up, walled in and preloaded, and forks a locked-in child per run.

Started by ``pool.py`` with one end of a socket. A request and its reply are each a JSON object behind its length. One
run at a time; the supervisor forks, bounds the wall clock and the output, kills what is left and clears the folder.
It ends when the other end of the socket is closed, and its child with it. Standard library only (``-I -S``).
"""

from __future__ import annotations

import gc
import io
import json
import os
import resource
import shutil
import socket
import stat
import sys
from typing import Any

from fastsft.verify import child, isolation
from fastsft.verify.run import Run, refused

# What answers import most, so that no run pays for it. Nothing that starts a thread or opens a file.
_PRELOADED = (
    "abc", "bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "enum", "fractions", "functools",
    "hashlib", "heapq", "io", "itertools", "linecache", "math", "operator", "queue", "random", "re", "statistics",
    "string", "textwrap", "threading", "traceback", "typing",
)  # fmt: skip


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
            run = Run(pid, pipes[0][0], pipes[1][0], pipes[2][0])
            run.watch(self.connection, request)
        except OSError as error:
            reply = refused(f"could not start: {error}")
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
