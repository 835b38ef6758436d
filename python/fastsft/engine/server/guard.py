"""What stands before every endpoint: who asks, how often, from which page, and how much they send."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastsft.engine.server.errors import ApiError
from fastsft.engine.server.settings import ServerSettings

_OPEN = {"/", "/health"}
_LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}
_MAX_CALLERS = 4096


class Guard:
    """ASGI middleware.

    A server that only this machine reaches answers only to names of this machine: a web page elsewhere could otherwise
    call it by a name of its own that it lets point here.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, answered: Callable[[int], None]) -> None:
        self._app, self._settings, self._answered = app, settings, answered
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]
        rate = settings.requests_per_minute
        self._buckets = Buckets(rate) if rate else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def noting(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self._answered(message["status"])
            await send(message)

        try:
            self._admit(scope)
            await self._app(scope, self._limited(scope, receive), noting)
        except ApiError as error:
            if begun:
                raise
            await error.response()(scope, receive, noting)

    def _admit(self, scope: Scope) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        host = re.sub(r":\d*$", "", headers.get(b"host", b"").decode("latin-1").lower())
        if self._settings.loopback and host not in {*_LOCAL_NAMES, self._settings.host}:
            raise ApiError(403, f"Host: expected a name of this machine, got {host!r:.200}")
        if scope["path"] in _OPEN:
            return
        caller = scope["client"][0] if scope.get("client") else ""
        if self._keys:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            digest = hashlib.sha256(key.strip()).digest()
            if scheme.lower() != b"bearer" or not any(hmac.compare_digest(digest, k) for k in self._keys):
                challenge = {"WWW-Authenticate": "Bearer"}
                message = "Authorization: expected a valid API key"
                raise ApiError(401, message, code="invalid_api_key", headers=challenge)
            caller = digest.hex()
        if self._buckets and scope["method"] == "POST" and (wait := self._buckets.take(caller)):
            retry = {"Retry-After": str(math.ceil(wait))}
            message = f"expected at most {self._settings.requests_per_minute} requests a minute"
            raise ApiError(429, message, code="rate_limit_exceeded", headers=retry)

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """``receive`` with limits on a body's size and on the time that it takes to come."""
        most, seconds = self._settings.max_body_bytes, self._settings.body_seconds
        declared = next((v for n, v in scope["headers"] if n.lower() == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > most:
            raise _too_large(most)
        loop = asyncio.get_running_loop()
        deadline, size, complete = loop.time() + seconds, 0, False

        async def limited() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - loop.time()))
            except asyncio.TimeoutError:
                late = f"the body: expected within {seconds:g} seconds"
                raise ApiError(408, late, headers={"Connection": "close"}) from None
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if size > most:
                raise _too_large(most)
            return message

        return limited


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body: expected at most {most} bytes", headers={"Connection": "close"})


class Buckets:
    """A token bucket for each caller: so many requests at once, and as many again in a minute."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._size, self._rate, self._clock = float(per_minute), per_minute / 60, clock
        self._callers: OrderedDict[str, tuple[float, float]] = OrderedDict()  # left, and when

    def take(self, caller: str) -> float:
        """0 and one less, or the seconds until there will be one."""
        now = self._clock()
        left, then = self._callers.pop(caller, (self._size, now))
        left = min(self._size, left + (now - then) * self._rate)
        allowed = left >= 1
        self._callers[caller] = (left - allowed, now)
        if len(self._callers) > _MAX_CALLERS:
            self._callers.popitem(last=False)
        return 0.0 if allowed else (1 - left) / self._rate
