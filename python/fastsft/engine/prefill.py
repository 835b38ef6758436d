"""A process of its own that computes prompts, so that what is being generated does not wait for them.

It is forked from the engine's process: it has the weights by copy-on-write and the cache by a shared mapping, into
whose blocks, allocated by the core, it writes keys and values. Nothing else is handed over. The mapping has no name: it
goes with the last of the two processes, however they end.

A job writes what its tokens say, whoever computes it and however often: one that was lost with its process goes whole
to the next one or, where processes end too often, is computed by the engine's own. A process that hangs, as one does
in which a lock was held at the fork, is ended: it uses no processor time while it has a job.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import socket
import struct
import time
import traceback
import weakref
from collections import deque
from collections.abc import Iterable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

import torch

from fastsft.engine.packed_runner import PackedRunner
from fastsft.engine.runner import Inputs
from fastsft.ops.decoder import DecoderAdapter
from fastsft.ops.threads import set_num_threads

_SHOWN = 2000  # characters of a worker's traceback
# After so many losses within so many seconds no process is started: what ends them would end the next one, too.
_LOSSES, _SECONDS = 4, 60.0
_PATIENCE, _LOOK = 30.0, 1.0  # seconds: without processor time a process hangs; how often that is looked at
_log = logging.getLogger("fastsft.engine")


class PrefillWorker:
    """One job at a time. The process starts with the first job, and sees the weights of that moment.

    Args:
        runner: with a shared cache.
        threads: of the worker.
    """

    def __init__(self, runner: PackedRunner, threads: int) -> None:
        self.failures = 0
        """Processes lost, and steps that failed in one."""
        self._runner, self._threads = runner, threads
        self._process: tuple[int, Connection] | None = None
        self._adapters: list[DecoderAdapter] = []  # what the process knows, by place
        self._job: bytes | None = None  # under way in it
        self._losses: deque[float] = deque(maxlen=_LOSSES)  # when
        self._used, self._moved, self._looked = -1, 0.0, 0.0  # processor time at this job, and when it last grew

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return self._process[0] if self._process else None

    def submit(self, inputs: Inputs) -> None:
        """Begin to compute these tokens, whose blocks are the worker's until it is done."""
        new = [a for a in dict.fromkeys(inputs.adapters) if a is not None and a not in self._adapters]
        if new:
            self.renew([*self._adapters, *new])
        places = [None if a is None else self._adapters.index(a) for a in inputs.adapters]
        tensors = (inputs.ids_T, inputs.cu_seqlens, inputs.context_lens_B, inputs.block_table)
        self._begin(pickle.dumps((*(t.numpy() for t in tensors), places)))

    def done(self, *, wait: bool) -> bool:
        """Whether the job is done; with ``wait``, not before it is. Raises what computing it raises in this process."""
        while self._job is not None and self._process is not None:
            connection = self._process[1]
            try:
                if not connection.poll(_LOOK if wait else 0):
                    if self._hangs():
                        self._end_hung(f"used no processor time for {_PATIENCE:.0f} seconds")
                        self._compute(self._job)
                    elif not wait:
                        return False
                    continue
                problem = connection.recv_bytes().decode()
            except (EOFError, OSError):
                self._lose(self._ending())
                self._begin(self._job)
                continue
            if problem:
                self.failures += 1
                _log.error("a step of the prefill worker failed; it is computed again:\n%s", problem[-_SHOWN:])
                self._compute(self._job)
            self._job = None
        return True

    def _begin(self, job: bytes) -> None:
        """Give the job to a process, a new one if need be, or compute it here."""
        while self._process is not None or not self._lost_too_many():
            try:
                if self._process is None:
                    self._process = self._start()
            except OSError as error:  # no memory, or too many processes
                self._lose(f"cannot be started ({error})")
                continue
            try:
                self._process[1].send_bytes(job)
                self._job, self._used, self._looked = job, -1, time.monotonic()
                return
            except BlockingIOError:
                self._end_hung(f"took no job for {_PATIENCE:.0f} seconds")
            except OSError:
                self._lose(self._ending())
        self._compute(job)

    def _compute(self, job: bytes) -> None:
        self._job = None
        with torch.inference_mode():
            _compute(self._runner, self._adapters, job)

    def _hangs(self) -> bool:
        """Whether the process has used no processor time for long."""
        now = time.monotonic()
        if self._process is None or now < self._looked + _LOOK:
            return False
        self._looked = now
        if (used := _processor_time(self._process[0])) != self._used:
            self._used, self._moved = used, now
        return now - self._moved > _PATIENCE

    def _end_hung(self, how: str) -> None:
        """The next process would be likely to hang as long: none is started for a while."""
        if self._process:
            os.kill(self._process[0], signal.SIGKILL)
            self._ending()
        self._losses.extend([time.monotonic()] * _LOSSES)
        self._lose(f"{how} and was killed")

    def _lost_too_many(self) -> bool:
        return len(self._losses) == _LOSSES and time.monotonic() - self._losses[0] < _SECONDS

    def _lose(self, how: str) -> None:
        self.failures += 1
        self._losses.append(time.monotonic())
        where = "in the engine's process for a while" if self._lost_too_many() else "by another one"
        _log.error("the prefill worker %s; its prompts are computed again, %s", how, where)

    def renew(self, adapters: Iterable[DecoderAdapter] = ()) -> None:
        """End the process, at once: the next job starts one that sees the weights of then, and these adapters."""
        self._adapters, self._job = list(adapters), None
        if self._process:
            self._process = None
            self._at_exit()

    def _ending(self) -> str:
        """How the process, which has ended or is about to, ended."""
        process, self._process = self._process, None
        self._at_exit.detach()
        code = os.waitstatus_to_exitcode(_reap(*process)) if process else 0
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"

    def _start(self) -> tuple[int, Connection]:
        ours, theirs = Pipe()
        pid = os.fork()
        if pid == 0:
            _work(self._runner, self._adapters, theirs, self._threads)
        theirs.close()
        patience = struct.pack("@ll", int(_PATIENCE), int(_PATIENCE % 1 * 1e6))  # a timeval
        with socket.socket(fileno=os.dup(ours.fileno())) as end:
            end.setblocking(True)  # whatever socket.setdefaulttimeout said
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
        # Not __del__: that may come when the interpreter has taken the modules apart.
        self._at_exit = weakref.finalize(self, _end, os.getpid(), pid, ours)
        return pid, ours


def _processor_time(pid: int) -> int:
    """Of all its threads, in clock ticks; 0 where there is no such process any more."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])
    return 0


def _end(owner: int, pid: int, connection: Connection) -> None:
    if os.getpid() == owner:  # not in a fork of the program
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        _reap(pid, connection)


def _reap(pid: int, connection: Connection) -> int:
    """The exit status of the process, which has ended or is about to."""
    connection.close()
    with contextlib.suppress(ChildProcessError):  # the host program collects its children itself
        return os.waitpid(pid, 0)[1]
    return 0


def _compute(runner: PackedRunner, adapters: list[DecoderAdapter], job: bytes) -> None:
    *arrays, places = pickle.loads(job)
    ids, bounds, contexts, table = map(torch.from_numpy, arrays)
    chosen = [None if place is None else adapters[place] for place in places]
    runner.forward(Inputs(ids, bounds, contexts, table, chosen), torch.empty(0, dtype=torch.int64))


def _work(runner: PackedRunner, adapters: list[DecoderAdapter], connection: Connection, threads: int) -> NoReturn:
    """The worker's life: until the other end of the connection is closed, be it by the kernel."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the engine's process decides
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # A server's connections and its listening socket would stay open as long as this process.
        for name in os.listdir("/proc/self/fd"):
            if int(name) > 2 and int(name) != connection.fileno():
                with contextlib.suppress(OSError):
                    os.close(int(name))
        torch.set_num_threads(1)  # OpenMP's other threads are not in this process
        set_num_threads(threads)
        with torch.inference_mode(), contextlib.suppress(EOFError, OSError):
            while True:
                job = connection.recv_bytes()
                try:
                    _compute(runner, adapters, job)
                    problem = ""
                except Exception:
                    problem = traceback.format_exc()
                connection.send_bytes(problem.encode())
    finally:
        os._exit(0)
