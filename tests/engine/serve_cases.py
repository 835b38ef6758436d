"""A server around a tiny model, on a real socket of this process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai

from fastsft.engine.core import EngineCore
from fastsft.engine.load import load_core
from fastsft.engine.options import EngineOptions
from fastsft.engine.server.run import bound, make_server
from fastsft.engine.server.settings import ServerSettings

MODEL = "tiny"


class Running:
    """What a test asks of a server, and what it looks at behind its back."""

    def __init__(self, core: EngineCore, port: int, key: str, stop: Callable[[], None]) -> None:
        self.stop = stop
        self.core, self.port, self.url = core, port, f"http://127.0.0.1:{port}"
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=self.url, timeout=60, headers=headers)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key or "none", max_retries=0, timeout=60)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def complete(self, **body: Any) -> dict[str, Any]:
        response = self.post("/v1/completions", **body)
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    def refused(self, status: int, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
        response = self.post(path, **body)
        assert response.status_code == status, response.text
        error: dict[str, Any] = response.json()["error"]
        return error

    def metric(self, name: str) -> float:
        """The sum of its values over all labels."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(("fastsft:" + name + "{",)))

    def settled(self) -> bool:
        """Whether nothing runs, waits or holds a block."""
        stats = self.core.stats()
        return not self.core.busy and stats.free_blocks == stats.blocks and not stats.running + stats.waiting


@contextlib.contextmanager
def serving(folder: Path, *, settings: dict[str, Any] | None = None, **engine: Any) -> Iterator[Running]:
    core = load_core(folder, options=EngineOptions(**{"num_blocks": 64, "block_size": 16, **engine}))
    chosen = ServerSettings(MODEL, port=0, **{"drain_seconds": 5.0, **(settings or {})})
    server = make_server(core, chosen)
    with bound(chosen) as listener:
        listener.listen()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()

        def stop() -> None:
            server.should_exit = True

        running = Running(core, listener.getsockname()[1], chosen.api_keys[0] if chosen.api_keys else "", stop)
        try:
            wait_for(lambda: server.started)
            yield running
        finally:
            running.http.close()
            running.openai.close()
            stop()
            thread.join(30)
    assert not thread.is_alive(), "the server does not stop"
    assert running.settled(), running.core.stats()


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def slow_down(core: EngineCore, seconds: float) -> None:
    """Let each step take at least so long."""
    step = core.step

    def slow() -> Any:
        if core.busy:
            time.sleep(seconds)
        return step()

    core.step = slow  # type: ignore[method-assign]
