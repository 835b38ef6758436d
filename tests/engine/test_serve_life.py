"""What happens to requests when clients leave, steps fail and the server is told to stop; and many of them at once."""

from __future__ import annotations

import contextlib
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from engine_cases import engine, prompts_of, write_model
from serve_cases import Running, serving, slow_down, wait_for

from fastsft.engine.request import SamplingParams

LONG: dict[str, Any] = {"prompt": "the cat", "max_tokens": 200, "ignore_eos": True, "seed": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("living") / "llama", "llama")


def send(server: Running, path: str, body: dict[str, Any]) -> socket.socket:
    """A request over a socket of its own, to be closed at any time."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/infill"])
def test_a_client_that_leaves_frees_its_blocks(path: str, stream: bool, folder: Path) -> None:
    bodies = {
        "/v1/completions": {**LONG, "n": 3},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 200, "ignore_eos": True},
        "/infill": {"input_prefix": "a", "n_predict": 200, "ignore_eos": True},
    }
    with serving(folder, max_num_seqs=2) as server:
        slow_down(server.core, 0.02)
        connection = send(server, path, {**bodies[path], "stream": stream})
        wait_for(lambda: server.core.stats().generated_tokens > 3)
        assert server.core.stats().free_blocks < server.core.stats().blocks
        connection.close()
        wait_for(server.settled)
        assert server.core.stats().generated_tokens < 150


def test_a_client_that_leaves_the_queue(folder: Path) -> None:
    with serving(folder, max_num_seqs=1) as server:
        slow_down(server.core, 0.02)
        first = send(server, "/v1/completions", LONG)
        wait_for(lambda: server.core.stats().running == 1)
        second = send(server, "/v1/completions", LONG)
        wait_for(lambda: server.core.stats().waiting == 1)
        second.close()
        wait_for(lambda: server.core.stats().waiting == 0)
        assert server.core.stats().running == 1
        first.close()
        wait_for(server.settled)


@pytest.mark.skipif(sys.platform != "linux", reason="the option is Linux's")
def test_a_client_that_reads_nothing_frees_its_blocks(folder: Path) -> None:
    body = json.dumps({**LONG, "stream": True, "logprobs": 20}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with serving(folder, settings={"unread_seconds": 0.5}) as server, socket.socket() as connection:
        slow_down(server.core, 0.02)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: server.core.stats().generated_tokens > 3)
        wait_for(server.settled)
        assert server.core.stats().generated_tokens < 150


def test_silence_is_broken_by_pings(folder: Path) -> None:
    with serving(folder, settings={"ping_seconds": 0.05}) as server:
        slow_down(server.core, 0.4)
        body = {**LONG, "max_tokens": 2, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            events = response.read().decode().split("\n\n")
        assert events.count(": ping") >= 4
        assert events[-2] == "data: [DONE]"
        chunks = list(server.openai.completions.create(model="tiny", prompt="a", max_tokens=2, stream=True, seed=1))
        assert chunks[-1].choices[0].finish_reason


def test_a_guide_is_compiled_beside_the_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    compiled = threading.Event()
    with serving(folder) as server, ThreadPoolExecutor() as clients:
        prepare = server.core.prepare

        def slow(params: SamplingParams) -> None:
            assert compiled.wait(20)
            prepare(params)

        monkeypatch.setattr(server.core, "prepare", slow)
        body = {"prompt": "the cat", "max_tokens": 9, "structured_outputs": {"regex": "a{3}"}}
        guided = clients.submit(server.complete, **body)
        refused = clients.submit(server.refused, 400, **body | {"structured_outputs": {"regex": "a("}})
        assert server.complete(prompt="on", max_tokens=4)["choices"], "others do not wait"
        assert not guided.done()
        compiled.set()
        assert guided.result()["choices"][0]["text"] == "aaa"
        assert refused.result()["param"] == "structured_outputs"


def test_a_failed_step_fails_its_requests_alone(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(folder) as server:
        expected = server.complete(**LONG)["choices"]
        step, calls, broken = server.core.step, iter(range(1000)), [True]

        def failing() -> Any:
            if server.core.busy and next(calls) >= 3 and broken:
                raise MemoryError("no room for scratch")
            return step()

        server.core.step = failing  # type: ignore[method-assign]
        error = server.refused(503, **LONG)
        assert (error["code"], "log says why" in error["message"]) == ("engine_failed", True)
        assert "no room for scratch" in caplog.text
        wait_for(server.settled)
        broken.clear()
        assert server.metric("engine_failures_total") == 1
        assert server.complete(**LONG)["choices"] == expected
        assert server.http.get("/health").status_code == 200


def test_a_lost_device_ends_the_engine(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No step would succeed any more: whoever watches over the server has to start another one."""

    def lost() -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with serving(folder) as server:
        server.core.step = server.core.check_device = lost  # type: ignore[method-assign]
        assert server.refused(503, **LONG)["code"] == "engine_failed"
        wait_for(lambda: server.http.get("/health").status_code == 503)
        assert "illegal memory access" in caplog.text


def start(folder: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "fastsft", "serve", str(folder), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    if "--json" in options:
        told = json.loads(line)
        assert told["model"] == "llama"
        return process, told["url"]
    found = re.fullmatch(r"llama: (http://127\.0\.0\.1:\d+)\n", line)
    assert found, line
    return process, found[1]


@pytest.mark.parametrize(
    ("number", "options"),
    [(signal.SIGTERM, ["--json"]), (signal.SIGINT, ["--speculative-config", '{"method": "ngram"}'])],
)
def test_a_signal_lets_requests_finish(number: signal.Signals, options: list[str], folder: Path) -> None:
    process, url = start(folder, *options)
    try:
        whole = httpx.post(f"{url}/v1/completions", json=LONG, timeout=60).json()["choices"][0]["text"]
        texts: list[str] = []
        with httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "stream": True}, timeout=60) as response:
            lines = (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: "))
            texts.append(json.loads(next(lines))["choices"][0]["text"])
            process.send_signal(number)
            for line in lines:
                texts.append("" if line == "[DONE]" else json.loads(line)["choices"][0]["text"])
        assert line == "[DONE]"
        assert "".join(texts) == whole
        assert process.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
    finally:
        process.kill()
        process.communicate()


def test_who_leaves_is_counted(folder: Path) -> None:
    with serving(folder) as server:
        slow_down(server.core, 0.02)
        connection = send(server, "/v1/completions", {**LONG, "n": 3})
        wait_for(lambda: server.core.stats().generated_tokens > 0)
        connection.close()
        wait_for(server.settled)
        server.complete(prompt="a", max_tokens=1, ignore_eos=True)
        lines = server.http.get("/metrics").text.splitlines()
        ended = [line for line in lines if line.startswith("fastsft:request_success_total{")]
        assert [re.findall('reason="([a-z]+)".* ([0-9.]+)', line) for line in ended] == [
            [("abort", "3.0")], [("length", "1.0")],
        ]  # fmt: skip


def test_who_waits_when_the_server_stops_is_told_to_come_again(folder: Path) -> None:
    with serving(folder, settings={"drain_seconds": 0.2}) as server:
        slow_down(server.core, 0.05)
        with ThreadPoolExecutor() as pool:
            waits = pool.submit(server.post, "/v1/completions", **LONG)
            wait_for(lambda: server.core.stats().running == 1)
            server.stop()
            response = waits.result()
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1


def test_what_outlasts_the_drain_is_told(folder: Path) -> None:
    with serving(folder, settings={"drain_seconds": 0.2}) as server:
        slow_down(server.core, 0.05)
        with server.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
            parts = response.iter_lines()
            next(parts)
            server.stop()
            rest = "\n".join(parts)
        assert "the server is shutting down" in rest
        assert rest.rstrip().endswith("data: [DONE]")


@pytest.mark.parametrize("seed", range(2))
def test_soak(seed: int, folder: Path) -> None:
    """Some hundred requests with clients that leave, wrong bodies and a small cache: each answer is what the request
    gets alone, and nothing is held at the end (the fixture looks)."""
    rng = random.Random(seed)
    prompts = prompts_of([rng.randrange(1, 60) for _ in range(12)], seed)
    alone = engine(folder)
    wanted = {}
    for i, prompt in enumerate(prompts):
        params = SamplingParams(n=2, seed=i, temperature=1.0, max_tokens=20)
        wanted[i] = [o.text for o in alone.generate({"prompt_token_ids": prompt}, params)[0].outputs]

    def one(task: tuple[int, str]) -> bool:
        i, kind = task
        body = {"prompt": prompts[i], "n": 2, "seed": i, "max_tokens": 20}
        if kind == "whole":
            return [c["text"] for c in server.complete(**body)["choices"]] == wanted[i]
        if kind == "stream":
            texts = ["", ""]
            for chunk in server.openai.completions.create(model="tiny", stream=True, **body):  # type: ignore[call-overload]
                texts[chunk.choices[0].index] += chunk.choices[0].text
            return texts == wanted[i]
        if kind == "leave":
            with send(server, "/v1/completions", {**body, "stream": bool(i % 2), "max_tokens": 190}) as connection:
                connection.settimeout(0.02)
                with contextlib.suppress(TimeoutError):
                    connection.recv(1 << 12)
            return True
        wrong: list[dict[str, Any]] = [{"prompt": [300]}, {"n": 0}, {"prompt": 5}, {"zzz": 1}, {"stop": [""]}]
        return server.post("/v1/completions", **{**body, **wrong[i % 5]}).status_code == 400

    kinds = ["whole", "stream", "leave", "wrong"]
    with serving(folder, num_blocks=16, max_num_seqs=6, max_batched_tokens=40) as server:
        tasks = [(rng.randrange(12), kinds[k % 4]) for k in range(200)]
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(one, tasks))
        wait_for(server.settled)
        assert server.core.stats().preemptions > 0
        assert server.metric("num_requests_running") == 0
