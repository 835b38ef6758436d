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
        events: what each holds. An ApiError from it becomes the last event.
        close: called at the end, also when the client disconnects before the first event.
        ping_seconds: after so long without one a comment is sent, which keeps proxies from closing the connection.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[Any, None], close: Callable[[], None], *, ping_seconds: float, done: bool = True
    ) -> None:
        super().__init__(headers=_HEADERS)
        self._events, self._close, self._ping, self._done = events, close, ping_seconds, done
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
        following: asyncio.Future[Any] | None = None
        try:
            while True:
                following = following or asyncio.ensure_future(_next(self._events))
                finished, _ = await asyncio.wait({following}, timeout=self._ping)
                if not finished:
                    await send(_part(": ping\n\n"))
                    continue
                try:
                    event = following.result()
                except StopAsyncIteration:
                    break
                except ApiError as error:
                    await send(_part(f"data: {to_json(error.body())}\n\n"))
                    break
                following = None
                await send(_part(f"data: {to_json(event)}\n\n"))
            await send(_part("data: [DONE]\n\n" if self._done else "", more=False))
        finally:
            if following is not None:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)


async def _next(events: AsyncGenerator[T, None]) -> T:
    return await anext(events)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _part(text: str, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}
