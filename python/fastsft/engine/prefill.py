"""A process of its own that computes prompts, so that what is being generated does not wait for them.

It is forked from the engine's process: it has the weights by copy-on-write and the cache by a shared mapping, into
whose blocks, allocated by the core, it writes keys and values. Nothing else is handed over. The mapping has no name: it
goes with the last of the two processes, however they end.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import traceback
from collections.abc import Iterable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import NoReturn

import torch

from fastsft.engine.runner import Inputs, Runner
from fastsft.ops.decoder import DecoderAdapter
from fastsft.ops.threads import set_num_threads

_SHOWN = 2000  # characters of a worker's traceback


class PrefillFailed(RuntimeError):
    """The worker ended, or its step failed. The engine goes on: the next prompt starts another worker."""


class PrefillWorker:
    """One job at a time. The process starts with the first job, and sees the weights of that moment.

    Args:
        runner: with a shared cache.
        threads: of the worker.
    """

    def __init__(self, runner: Runner, threads: int) -> None:
        self._runner, self._threads, self._owner = runner, threads, os.getpid()
        self._process: tuple[int, Connection] | None = None
        self._adapters: list[DecoderAdapter] = []  # what the process knows, by place

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return self._process[0] if self._process else None

    def submit(self, inputs: Inputs) -> None:
        """Begin to compute these tokens, whose blocks are the worker's until it is done.

        Raises:
            PrefillFailed: the worker has ended.
        """
        new = [a for a in dict.fromkeys(inputs.adapters) if a is not None and a not in self._adapters]
        if new:
            self.renew([*self._adapters, *new])
        places = [None if a is None else self._adapters.index(a) for a in inputs.adapters]
        tensors = (inputs.ids_T, inputs.cu_seqlens, inputs.context_lens_B, inputs.block_table)
        job = pickle.dumps((*(t.numpy() for t in tensors), places))
        if self._process is None:
            self._process = self._start()
        try:
            self._process[1].send_bytes(job)
        except OSError:
            raise self._ended() from None

    def done(self, *, wait: bool) -> bool:
        """Whether the job is done; with ``wait``, not before it is.

        Raises:
            PrefillFailed: it will never be.
        """
        if self._process is None:
            raise PrefillFailed("expected a job under way, found no worker")
        connection = self._process[1]
        try:
            if not wait and not connection.poll():
                return False
            problem = connection.recv_bytes().decode()
        except (EOFError, OSError):
            raise self._ended() from None
        if problem:
            raise PrefillFailed(f"the prefill worker's step failed:\n{problem[-_SHOWN:]}")
        return True

    def renew(self, adapters: Iterable[DecoderAdapter] = ()) -> None:
        """End the process, at once: the next job starts one that sees the weights of then, and these adapters."""
        self._adapters = list(adapters)
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process[0], signal.SIGKILL)
            self._reap(*self._process)

    def _reap(self, pid: int, connection: Connection) -> int:
        """The exit status of the process, which has ended or is about to."""
        self._process = None
        connection.close()
        with contextlib.suppress(ChildProcessError):  # the host program collects its children itself
            return os.waitpid(pid, 0)[1]
        return 0

    def _ended(self) -> PrefillFailed:
        code = os.waitstatus_to_exitcode(self._reap(*self._process)) if self._process else 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return PrefillFailed(f"the prefill worker {how}; its prompts will be computed again")

    def _start(self) -> tuple[int, Connection]:
        ours, theirs = Pipe()
        pid = os.fork()
        if pid == 0:
            _work(self._runner, self._adapters, theirs, self._threads)
        theirs.close()
        return pid, ours

    def __del__(self) -> None:
        if os.getpid() == self._owner:  # not in a fork of the program, whose copy this is
            self.renew()


def _work(runner: Runner, adapters: list[DecoderAdapter], connection: Connection, threads: int) -> NoReturn:
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
                *arrays, places = pickle.loads(connection.recv_bytes())
                ids, bounds, contexts, table = map(torch.from_numpy, arrays)
                chosen = [None if place is None else adapters[place] for place in places]
                inputs = Inputs(ids, bounds, contexts, table, chosen)
                try:
                    runner.forward(inputs, torch.empty(0, dtype=torch.int64))
                    problem = ""
                except Exception:
                    problem = traceback.format_exc()
                connection.send_bytes(problem.encode())
    finally:
        os._exit(0)
