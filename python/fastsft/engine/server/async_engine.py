"""The engine in a thread of its own, for callers in an event loop.

What a caller asks for goes through an inbox, which the thread empties between steps; what a step adds goes to each
caller's queue, all of it in one call into the loop. Nothing else but compiled guides is shared, so no lock is held
while a step runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fastsft.engine.core import EngineCore
from fastsft.engine.request import Request, Update
from fastsft.engine.stats import Stats

T = TypeVar("T")
_log = logging.getLogger("fastsft.serve")
_STOPPING = "the server is shutting down"


class EngineFailed(RuntimeError):
    """A step failed, or the engine has stopped: the request is lost."""


class TimedOut(RuntimeError):
    """The request took longer than it may."""


class Stream:
    """The updates of some requests, until each of their continuations has ended: as many at once as there are when they
    are asked for. A context manager that closes it."""

    def __init__(
        self, engine: AsyncEngine, requests: Sequence[Request], observe: Callable[[Update | None], None] | None = None
    ) -> None:
        self.requests = tuple(requests)
        self._engine, self._observe = engine, observe
        self._come: list[Update] = []
        self._error: Exception | None = None
        self._news = asyncio.Event()
        self._left = sum(r.params.best_of or r.params.n for r in requests)
        self.timer: asyncio.TimerHandle | None = None

    @property
    def finished(self) -> bool:
        return self._left == 0

    def put(self, update: Update) -> None:
        self._left -= update.finish_reason is not None
        if self._observe:
            self._observe(update)
        self._come.append(update)
        self._news.set()

    def fail(self, error: Exception) -> None:
        """No more will come."""
        self._error = self._error or error
        self._news.set()

    def close(self) -> None:
        """No more is wanted: what has not ended is aborted."""
        self._engine.release(self)
        while self._observe and self._left:
            self._left -= 1
            self._observe(None)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> list[Update]:
        """
        Raises:
            EngineFailed, TimedOut: no more will come.
        """
        if self.finished and not self._come:
            raise StopAsyncIteration
        await self._news.wait()
        if not self._come and self._error is not None:
            raise self._error
        updates, self._come = self._come, []
        if self._error is None:
            self._news.clear()
        return updates


class AsyncEngine:
    """One thread that runs ``core``, which belongs to it from :meth:`start` to :meth:`stop`.

    The methods are for one event loop, that which :meth:`start` is called in.
    """

    def __init__(self, core: EngineCore) -> None:
        self.tokenizer = core.tokenizer
        self.snapshot: Stats = core.stats()
        """As of the last step."""
        self.failures = 0
        """Steps that failed."""
        self._core = core
        self._inbox: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._streams: dict[str, Stream] = {}
        self._thread = threading.Thread(target=self._run, name="fastsft-engine", daemon=True)
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed: str | None = "the engine has not been started"

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._closed = None
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests are accepted."""
        return self._closed is None and self._thread.is_alive()

    async def call(self, function: Callable[[EngineCore], T]) -> T:
        """Run a function on the core, between two steps.

        Raises:
            EngineFailed: the engine has stopped. Whatever the function raises.
        """
        if self._closed is not None:
            raise EngineFailed(self._closed)
        answer: asyncio.Future[T] = self._loop.create_future()

        def settle(result: Any, error: Exception | None) -> None:
            if answer.done():  # nobody waits any more
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(result)

        def run() -> None:
            try:
                self._tell(settle, function(self._core), None)
            except Exception as error:
                self._tell(settle, None, error)

        self._inbox.put(run)
        return await answer

    async def submit(
        self,
        requests: Sequence[Request],
        *,
        seconds: float | None = None,
        observe: Callable[[Update | None], None] | None = None,
    ) -> Stream:
        """Queue requests, all or none of them. Whoever gets the stream must close it.

        Args:
            seconds: in which they must end.
            observe: is told each update when it comes, whoever reads the stream and when, and None for each
                continuation that is given up.

        Raises:
            RequestError, QueueFull: as :meth:`EngineCore.add` does. EngineFailed: the engine has stopped.
        """
        stream = Stream(self, requests, observe)
        self._streams.update((r.request_id, stream) for r in requests)
        self._idle.clear()
        try:
            for params in {id(r.params): r.params for r in requests if r.params.structured_outputs}.values():
                await asyncio.to_thread(self._core.prepare, params)  # others' steps go on meanwhile
            await self.call(lambda core: core.add(*requests))
        except BaseException:  # they may be in, where the caller was cancelled
            self.release(stream)
            raise
        if seconds is not None:
            late = TimedOut(f"the request was not finished within {seconds:g} seconds")
            stream.timer = self._loop.call_later(seconds, stream.fail, late)
        return stream

    def release(self, stream: Stream) -> None:
        if stream.timer:
            stream.timer.cancel()
        left = [r.request_id for r in stream.requests if self._streams.pop(r.request_id, None)]
        if left and not stream.finished:
            self._inbox.put(lambda: [self._core.abort(i) for i in left])
        if not self._streams:
            self._idle.set()

    def close(self, reason: str = _STOPPING) -> None:
        """Accept no more; what is in progress goes on."""
        self._closed = self._closed or reason

    async def drain(self, seconds: float) -> None:
        """Accept no more and wait for what is in progress; what is left after that time fails."""
        self.close()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        self._fail_all(_STOPPING)

    async def stop(self) -> None:
        """Give everything up and end the thread."""
        self.close()
        self._fail_all(_STOPPING)
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    def _fail_all(self, reason: str) -> None:
        for stream in set(self._streams.values()):
            stream.fail(EngineFailed(reason))

    def _tell(self, function: Callable[..., object], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody listens
            self._loop.call_soon_threadsafe(function, *args)

    def _run(self) -> None:
        try:
            self._work()
        except BaseException:
            _log.exception("the engine's thread failed")
            self._tell(self.close, "the engine failed; the server's log says why")
            self._tell(self._fail_all, "the engine failed; the server's log says why")

    def _work(self) -> None:
        core, inbox = self._core, self._inbox
        while True:
            while not core.busy or not inbox.empty():
                task = inbox.get()
                if task is None:
                    return
                task()
                self.snapshot = core.stats()
            try:
                updates = core.step()
            except Exception:
                # Nothing that runs can be trusted to go on: it would fail again.
                _log.exception("a step failed; its requests are given up")
                for request_id in list(self._streams):
                    core.abort(request_id)
                self.failures += 1
                self._tell(self._fail_all, "a step of the engine failed; the server's log says why")
                updates = []
                core.check_device()  # where it is lost, the thread ends, and /health says so
            self.snapshot = core.stats()
            if updates:
                self._tell(self._deliver, updates)

    def _deliver(self, updates: list[Update]) -> None:
        for update in updates:
            if (stream := self._streams.get(update.request_id)) is not None:
                stream.put(update)
