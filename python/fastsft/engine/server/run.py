"""Runs a server until it is told to stop."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import uvicorn

from fastsft.engine.core import EngineCore
from fastsft.engine.server.app import make_app
from fastsft.engine.server.async_engine import AsyncEngine
from fastsft.engine.server.settings import ServerSettings

_AFTER_DRAIN = 5  # seconds for the last events to be sent


class _Server(uvicorn.Server):
    """On SIGTERM and SIGINT it accepts no more connections, lets requests finish, and stops. Connections on which no
    request begins are closed after the time that a body has: there may be only so many."""

    def __init__(self, config: uvicorn.Config, engine: AsyncEngine, settings: ServerSettings) -> None:
        super().__init__(config)
        self._engine, self._drain_seconds = engine, settings.drain_seconds
        self._silent_seconds = settings.body_seconds
        self._silent: dict[Any, float] = {}  # connection and its last request -> since when

    async def on_tick(self, counter: int) -> bool:
        now = time.monotonic()
        last = [(c, getattr(c, "cycle", self)) for c in self.server_state.connections]
        silent = [one for one in last if one[1] is None or getattr(one[1], "response_complete", False)]
        self._silent = {one: self._silent.get(one, now) for one in silent}
        for (connection, _), since in self._silent.items():
            if now - since > self._silent_seconds:
                connection.transport.abort()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        drain = asyncio.ensure_future(self._engine.drain(self._drain_seconds))
        await super().shutdown(sockets)
        await drain


def make_server(core: EngineCore, settings: ServerSettings) -> uvicorn.Server:
    """A server for listening sockets that its ``run`` is given."""
    app = make_app(core, settings)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, limit_concurrency=settings.max_connections,
        timeout_graceful_shutdown=int(settings.drain_seconds) + _AFTER_DRAIN,
    )  # fmt: skip
    return _Server(config, app.state.engine, settings)


def bound(settings: ServerSettings) -> socket.socket:
    """A socket at the settings' address.

    Raises:
        OSError: it cannot be bound.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sys.platform == "linux":  # its connections inherit it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(settings.unread_seconds * 1000))
        listener.bind((settings.host, settings.port))
    except BaseException:
        listener.close()
        raise
    return listener


def run(core: EngineCore, settings: ServerSettings, announce: Callable[[str], None]) -> None:
    """Serve; returns when a signal has stopped it. ``announce`` is told the address as soon as clients can connect.

    Raises:
        OSError: the address cannot be bound.
    """
    with bound(settings) as listener:
        server = make_server(core, settings)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        listener.listen()
        announce(f"http://{host}:{listener.getsockname()[1]}")
        for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again when it has stopped
            signal.signal(number, lambda *_: None)
        server.run(sockets=[listener])
