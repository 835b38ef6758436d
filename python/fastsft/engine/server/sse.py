"""Answers that notice when nobody reads them any more: whole ones, and streams of server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fastsft.engine.server.errors import ApiError, to_json

T = TypeVar("T")
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies are to pass events on at once


class ClientGone(Exception):
    """Whoever asked has closed the connection."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Wait for ``work``, which is cancelled when the client disconnects.

    Raises:
        ClientGone: it did.
    """
    gone, task = asyncio.ensure_future(_disconnect(receive)), asyncio.ensure_future(work)
    try:
        await asyncio.wait({gone, task}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(gone, task, return_exceptions=True)


class EventStream(Response):
    """Server-sent events, ended by ``data: [DONE]``.

    Args:
        events: what each holds, of those that can go out together. An ApiError from it becomes the last event.
        close: called at the end, also when the client disconnects before the first event.
        ping_seconds: after so long without one a comment is sent, which keeps proxies from closing the connection.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[list[Any], None],
        close: Callable[[], None],
        *,
        ping_seconds: float,
        done: bool = True,
    ) -> None:
        super().__init__(headers=_HEADERS)
        self._events, self._close, self._ping, self._done = events, close, ping_seconds, done
        self._spoke = 0.0  # when something was sent last
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(_disconnect(receive))
        sending = asyncio.ensure_future(self._send(send))
        try:
            await asyncio.wait({gone, sending}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            gone.cancel()
            sending.cancel()
            await asyncio.gather(gone, sending, return_exceptions=True)
            await self._events.aclose()
            self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._spoke = asyncio.get_running_loop().time()
        pinging = asyncio.ensure_future(self._break_silences(send))
        try:
            async for events in self._events:
                if events:
                    await self._say(send, "".join(f"data: {to_json(event)}\n\n" for event in events))
        except ApiError as error:
            await self._say(send, f"data: {to_json(error.body())}\n\n")
        finally:
            pinging.cancel()
            await asyncio.gather(pinging, return_exceptions=True)
        await self._say(send, "data: [DONE]\n\n" if self._done else "", more=False)

    async def _break_silences(self, send: Send) -> None:
        """A task for a whole stream: a time-out for each event would cost more than the event."""
        loop = asyncio.get_running_loop()
        while True:
            while (left := self._spoke + self._ping - loop.time()) > 0:
                await asyncio.sleep(left)
            await self._say(send, ": ping\n\n")

    async def _say(self, send: Send, text: str, more: bool = True) -> None:
        self._spoke = asyncio.get_running_loop().time()
        await send({"type": "http.response.body", "body": text.encode(), "more_body": more})


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
