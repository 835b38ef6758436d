"""A server under load that is not kind: 10,000 requests to ``fastsft serve`` in a process of its own, from 24 clients
at once. Half are answered whole and a quarter as streams; an eighth of the clients leave before the end, an eighth
send what is wrong. Every fourth connection is new.

The gates: each answer is the one that the engine gives the request alone; each wrong one is refused with a 4xx; at the
end nothing runs, waits or holds a block, the server's memory has grown by less than 1 MiB in 1,000 requests (after the
first 3,000), its open files are as many as before, and on SIGTERM it exits with 0.

``extra_info``: requests and tokens per second of all, and the time to a stream's first token. Client and server share
the cores; the model is so small that this measures the server around it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sizes import size
from train_case import Replay

REQUESTS = int(size("REQUESTS", 10_000, quick=2000))
CLIENTS, PROMPTS, WARM = 24, 64, 3 * REQUESTS // 10
MODEL = {
    "model_type": "qwen2", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512, "tie_word_embeddings": True,
    "initializer_range": 0.15,
}  # fmt: skip
KINDS = ("whole", "whole", "whole", "whole", "stream", "stream", "leave", "wrong")
WRONG: tuple[bytes, ...] = (
    b"", b"{", b"[[[[", b"\xff\xfe", b'{"prompt": 5}', b'{"prompt": [99999]}', b'{"prompt": "a", "zzz": 1}',
    b'{"prompt": "a", "temperature": -1}', b'{"prompt": "a", "n": 1000000000}', b'{"prompt": "\\ud800"}',
    json.dumps({"prompt": [7] * 4000}).encode(), b'{"prompt": "a", "stop": [""]}',
)  # fmt: skip
CLOCK = Replay()


def write_model(folder: Path) -> Path:
    from fastsft.models.tokenizer import Tokenizer
    from fastsft.models.weights import init_model, save_model

    save_model(init_model(MODEL, seed=0), folder)
    Tokenizer.train(["def f(x): return x"], 300).save(folder)
    return folder


@dataclass
class Load:
    """What to ask, what must come back, and what did."""

    port: int
    bodies: list[dict[str, Any]]
    expected: list[list[str]]
    first: list[float] = field(default_factory=list)
    memory: list[tuple[int, float]] = field(default_factory=list)
    done: int = 0

    async def run(self) -> None:
        rng = random.Random(0)
        tasks = iter([(rng.choice(KINDS), rng.randrange(PROMPTS), rng.random()) for _ in range(REQUESTS)])
        await asyncio.gather(*(self.client(tasks) for _ in range(CLIENTS)))

    async def client(self, tasks: Any) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        for kind, i, chance in tasks:
            if kind == "wrong":
                await self.send(writer, WRONG[i % len(WRONG)])
                status, _ = await whole(reader)
                assert 400 <= status < 500, (status, WRONG[i % len(WRONG)])
            else:
                body = {**self.bodies[i], "stream": kind == "stream" or (kind == "leave" and i % 2 == 0)}
                begin = time.perf_counter()
                await self.send(writer, json.dumps(body).encode())
                if kind == "whole":
                    status, answer = await whole(reader)
                    assert status == 200, answer
                    found = [c["text"] for c in json.loads(answer)["choices"]]
                    assert found == self.expected[i], (found, self.expected[i])
                elif kind == "stream":
                    await self.stream(reader, i, begin)
                else:
                    await asyncio.sleep(chance * 0.05)
            self.done += 1
            if kind == "leave" or self.done % 4 == 0:
                writer.close()
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            if self.done % 250 == 0:
                await self.look()
        writer.close()

    async def send(self, writer: asyncio.StreamWriter, body: bytes) -> None:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()

    async def stream(self, reader: asyncio.StreamReader, i: int, begin: float) -> None:
        texts = [""] * len(self.expected[i])
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in head, head
        first = True
        async for part in chunks(reader):
            if first:
                self.first.append(time.perf_counter() - begin)
                first = False
            for event in part.decode().split("\n\n"):
                if event and event != "data: [DONE]":
                    (choice,) = json.loads(event.removeprefix("data: "))["choices"]
                    texts[choice["index"]] += choice["text"]
        assert texts == self.expected[i]

    async def look(self) -> None:
        values = await self.metrics()
        self.memory.append((self.done, values["process_resident_memory_bytes"] / 2**20))

    async def metrics(self) -> dict[str, float]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        _, text = await whole(reader)
        writer.close()
        lines = [line.rpartition(" ") for line in text.decode().splitlines() if not line.startswith("#")]
        return {name.partition("{")[0]: float(value) for name, _, value in lines}


async def whole(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body of an answer with a length."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = re.search(r"(?i)content-length: (\d+)", head)
    assert length, head
    return int(head.split()[1]), await reader.readexactly(int(length[1]))


async def chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int(await reader.readline(), 16):
        yield (await reader.readexactly(size + 2))[:-2]
    await reader.readline()


def requests(folder: Path) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """Bodies, and the engine's own answers to each alone."""
    import fastsft

    rng = np.random.default_rng(0)
    llm = fastsft.LLM(folder)
    shared = rng.integers(8, 300, 40).tolist()  # half of them begin alike
    bodies, texts = [], []
    for i in range(PROMPTS):
        ids = [*(shared if i % 2 else []), *rng.integers(8, 300, rng.integers(1, 120)).tolist()]
        options = {"n": int(rng.integers(1, 3)), "max_tokens": int(rng.integers(1, 48)), "seed": i, "temperature": 1.0}
        (output,) = llm.generate({"prompt_token_ids": ids}, fastsft.SamplingParams(**options))
        bodies.append({"prompt": ids, **options})
        texts.append([o.text for o in output.outputs])
    return bodies, texts


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.timeout(3600)
def test_serve(benchmark, tmp_path):
    folder = write_model(tmp_path)
    bodies, expected = requests(folder)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FASTSFT_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fastsft", "serve", str(folder), "--port", "0", "--json", "--kv-cache-mib", "4"]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        url = json.loads(server.stdout.readline())["url"]
        load = Load(int(url.rpartition(":")[2]), bodies, expected)

        async def all_of_it() -> tuple[dict[str, float], dict[str, float], float]:
            before = await load.metrics()
            begin = time.perf_counter()
            await load.run()
            seconds = time.perf_counter() - begin
            for _ in range(200):  # the last ones left a moment ago
                after = await load.metrics()
                if (
                    after["fastsft:kv_cache_usage_perc"] == 0
                    and after["process_open_fds"] <= before["process_open_fds"]
                ):
                    break
                await asyncio.sleep(0.05)
            return before, after, seconds

        before, after, seconds = asyncio.run(all_of_it())
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()
    assert load.done == REQUESTS
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "engine_failures_total"):
        assert after[f"fastsft:{name}"] == 0, name
    assert after["process_open_fds"] == before["process_open_fds"]
    at, resident = np.array([sample for sample in load.memory if sample[0] > WARM]).T
    growth = np.polyfit(at, resident, 1)[0] * 1000

    benchmark.group = (
        f"{REQUESTS} requests to a server, {CLIENTS} clients, streams, aborts and malformed ones; one thread"
    )
    benchmark.pedantic(lambda: CLOCK.advance(seconds), rounds=1)
    benchmark.extra_info |= {
        "requests_per_second": REQUESTS / seconds,
        "tokens_per_second": after["fastsft:generation_tokens_total"] / seconds,
        "first_token_ms_p50": float(np.quantile(load.first, 0.5) * 1e3),
        "first_token_ms_p99": float(np.quantile(load.first, 0.99) * 1e3),
        "MiB_per_1000_requests": float(growth),
        "prefix_hits_of_prompt_tokens": after["fastsft:prefix_cache_hits_total"] / after["fastsft:prompt_tokens_total"],
        "wrong_answers": 0,
    }  # fmt: skip
    assert growth < 1
