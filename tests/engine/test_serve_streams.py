"""What an event of a stream costs, which a busy server pays thousands of times a second."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="part of the serve extra")

from fastsft.engine.request import Request, SamplingParams, Update
from fastsft.engine.server.async_engine import EngineFailed, Stream
from fastsft.engine.server.errors import ApiError
from fastsft.engine.server.sse import EventStream


class NoEngine:
    def release(self, stream: Stream) -> None:
        pass


def stream_of(continuations: int) -> Stream:
    return Stream(NoEngine(), [Request("a", (1,), SamplingParams(n=continuations))])  # type: ignore[arg-type]


def update(index: int, text: str, reason: str | None = None) -> Update:
    return Update("a", index, (5,), text, None, reason, None, 0, 0.0)


async def sent_by(events: AsyncGenerator[list[Any], None], **options: Any) -> tuple[list[str], int]:
    """Bodies, and how many tasks it took."""
    tasks, bodies = 0, []

    def counted(loop: Any, work: Coroutine[Any, Any, Any], **context: Any) -> asyncio.Task[Any]:
        nonlocal tasks
        tasks += 1
        return asyncio.Task(work, loop=loop, **context)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            bodies.append(message["body"].decode())

    async def receive() -> Any:
        await asyncio.Event().wait()

    response = EventStream(events, lambda: None, **{"ping_seconds": 15, **options})
    asyncio.get_running_loop().set_task_factory(counted)
    await response({"type": "http"}, receive, send)
    return bodies, tasks


def test_an_event_takes_no_task() -> None:
    async def events() -> AsyncGenerator[list[str], None]:
        for i in range(200):
            await asyncio.sleep(0)
            yield [f"{i}"]

    bodies, tasks = asyncio.run(sent_by(events()))
    assert bodies == [*(f'data: "{i}"\n\n' for i in range(200)), "data: [DONE]\n\n"]
    assert tasks <= 5


def test_updates_that_came_together_go_out_together() -> None:
    async def main() -> list[str]:
        stream = stream_of(3)

        async def events() -> AsyncGenerator[list[str], None]:
            async for updates in stream:
                yield [u.text for u in updates]

        for i in range(3):
            stream.put(update(i, f"a{i}"))
        running = asyncio.ensure_future(sent_by(events()))
        await asyncio.sleep(0.01)
        for i in range(3):
            stream.put(update(i, f"b{i}", "length"))
        return (await running)[0]

    first, second, done = asyncio.run(main())
    assert first == "".join(f'data: "a{i}"\n\n' for i in range(3))
    assert second == "".join(f'data: "b{i}"\n\n' for i in range(3))
    assert done == "data: [DONE]\n\n"


def test_what_came_before_a_failure_is_shown() -> None:
    async def main() -> tuple[list[str], int]:
        stream = stream_of(2)

        async def events() -> AsyncGenerator[list[str], None]:
            try:
                async for updates in stream:
                    yield [u.text for u in updates]
            except EngineFailed as error:
                raise ApiError(503, str(error)) from None

        stream.put(update(0, "a"))
        stream.fail(EngineFailed("no more"))
        stream.put(update(1, "b"))
        return await sent_by(events())

    bodies, _ = asyncio.run(main())
    assert bodies[0] == 'data: "a"\n\ndata: "b"\n\n'
    assert '"message":"no more"' in bodies[1]
    assert bodies[2] == "data: [DONE]\n\n"


def test_pings_come_only_in_silence() -> None:
    async def events() -> AsyncGenerator[list[str], None]:
        for i in range(20):
            await asyncio.sleep(0.01)
            yield [f"{i}"]
        await asyncio.sleep(1.0)
        yield []

    bodies, _ = asyncio.run(sent_by(events(), ping_seconds=0.4))
    assert bodies[:20] == [f'data: "{i}"\n\n' for i in range(20)]
    assert set(bodies[20:-1]) == {": ping\n\n"}
    assert bodies[-1] == "data: [DONE]\n\n"
