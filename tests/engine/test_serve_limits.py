"""What the server refuses, with which status, and that the error names what is to blame."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from engine_cases import write_model
from serve_cases import Running, serving, slow_down, wait_for

from fastsft.engine.server.guard import Buckets
from fastsft.engine.server.settings import ServerSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("guarded") / "llama", "llama")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with serving(folder, settings={"max_body_bytes": 20_000, "max_choices": 8}) as running:
        yield running


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"prompt": "a", "nonsense": 1}, "nonsense", "does not know the field"),
        ({}, "prompt", "Field required"),
        ({"prompt": []}, "prompt", "at least one"),
        ({"prompt": ""}, "prompt", "empty prompt"),
        ({"prompt": [[]]}, "prompt", "empty prompt"),
        ({"prompt": {"a": 1}}, "prompt", "got {'a': 1}"),
        ({"prompt": [1, "a"]}, "prompt", "valid"),
        ({"prompt": [280]}, "prompt", r"token ids in \[0, 280\), got 280"),
        ({"prompt": "\ufdd0"}, "prompt", "noncharacter"),
        ({"prompt": [5] * 256}, "prompt", "256 tokens leave no room"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "at least 1"),
        ({"prompt": "a", "max_tokens": "5"}, "max_tokens", "integer, got '5'"),
        ({"prompt": "a", "max_tokens": 10**30}, "max_tokens", "integer"),
        ({"prompt": "a", "temperature": -1}, "temperature", "1e-30 to 1e\\+30, got -1"),
        ({"prompt": "a", "top_p": 0}, "top_p", "1e-30 to 1, got 0"),
        ({"prompt": "a", "top_p": True}, "top_p", "got True"),
        ({"prompt": "a", "seed": -1}, "seed", "got -1"),
        ({"prompt": "a", "stop": ""}, "stop", "non-empty"),
        ({"prompt": "a", "stop_token_ids": [999]}, "stop_token_ids", "^stop_token_ids: .*got 999"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "from 0 to 20"),
        ({"prompt": "a", "n": 9}, "n", "at most 8"),
        ({"prompt": ["a"] * 3, "n": 3}, "n", "at most 8 .* got 9"),
        ({"prompt": ["a"] * 8 + ["\ufdd0"]}, "n", "at most 8 .* got 9"),  # before any is read
        ({"prompt": "a", "prompt_logprobs": 1}, "prompt_logprobs", "does not know"),
        ({"prompt": "a", "structured_outputs": {"regex": "("}}, "structured_outputs", "^structured_outputs: regex:"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "only with stream"),
        ({"prompt": [1], "suffix": "b"}, "suffix", "prompt of text"),
        ({"prompt": "a", "best_of": 2, "n": 1, "stream": True}, "best_of", "not with stream"),
        ({"prompt": "a", "best_of": 1, "n": 2}, "best_of", ">= n"),
        ({"prompt": "a", "best_of": 9}, "n", "at most 8"),
        ({"prompt": "a", "logit_bias": {"a": 1}}, "logit_bias", "token ids"),
        ({"prompt": "a", "logit_bias": {"999": 1}}, "logit_bias", "999"),
        ({"prompt": "a", "structured_outputs": {"regexp": "a"}}, "structured_outputs", "keys among .*, regex"),
        ({"prompt": "a", "structured_outputs": {"regex": 5}}, "structured_outputs", "regex: expected a string, got 5"),
        ({"prompt": "a", "structured_outputs": 5}, "structured_outputs", "got 5"),
        ({"prompt": "a", "tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"prompt": "a", "tool_choice": "required"}, "tool_choice", "not supported"),
    ],
    ids=str,
)
def test_wrong_fields_are_named(body: dict[str, Any], param: str | None, says: str, server: Running) -> None:
    error = server.refused(400, **body)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert re.search(says, error["message"]), error["message"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"messages": []}, "at least one"),
        ({"messages": [{"content": "a"}]}, r"messages\[0\].role"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "parts of type text"),
        ({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, "only with logprobs"),
        ({"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 21}, "^top_logprobs.* 20"),
        ({"messages": [{"role": "user", "content": "a"}], "prompt_logprobs": 2}, "prompt_logprobs: .* does not know"),
        ({"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "max_completion_tokens": 2}, "got both"),
        ({"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"messages": []}}, "set already"),
        (
            {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "other"}},
            "expected text, json_object",
        ),
        ({"messages": [{"role": "user", "content": "mat " * 300}]}, "leave no room"),
    ],
    ids=str,
)
def test_wrong_conversations_are_named(body: dict[str, Any], says: str, server: Running) -> None:
    message = server.refused(400, "/v1/chat/completions", **body)["message"]
    assert re.search(says, message), message


@pytest.mark.parametrize("name", ["n", "best_of", "max_tokens", "logprobs", "prompt_logprobs"])
def test_infills_refuse_what_they_do_not_do(name: str, server: Running) -> None:
    assert server.refused(400, "/infill", input_prefix="a", n_predict=2, **{name: 2})["param"] == name


def test_a_guide_has_a_size(folder: Path) -> None:
    with serving(folder) as roomy:
        says = roomy.refused(400, prompt="a", structured_outputs={"regex": "a" * 70_000})["message"]
    assert "structured_outputs: expected at most 65536 characters, got 70000" in says


def test_fields_without_effect_are_taken(server: Running) -> None:
    plain = {"prompt": "the cat", "max_tokens": 4, "temperature": 0}
    more = {"user": "me", "metadata": {"a": 1}, "stop": None, "tools": [], "tool_choice": "none", "store": False}
    assert server.complete(**plain)["choices"] == server.complete(**plain, **more)["choices"]


def test_bodies_that_are_none(server: Running) -> None:
    json_type = {"Content-Type": "application/json"}
    objects = [b'"a"', b'{"prompt": NaN}', b'{"prompt": "\\ud800"}', b'{"max_tokens": 1e400']
    for content in (b"", b"{", b"[1]", b"\xff", b"[" * 10_000, b"null", *objects):
        response = server.http.post("/v1/completions", content=content, headers=json_type)
        assert response.status_code == 400, content
        assert "body" in response.json()["error"]["message"]
    form = {"Content-Type": "text/plain"}  # what a page of any other site could send
    assert server.http.post("/v1/completions", content=b'{"prompt": "a"}', headers=form).status_code == 415
    assert server.http.get("/v1/completions").status_code == 405
    assert server.http.get("/nothing").json()["error"]["message"] == "GET /nothing: Not Found"


@pytest.mark.parametrize("levels", [65, 500, 900, 1000])
@pytest.mark.parametrize(
    ("path", "head", "tail"),
    [
        ("/v1/completions", "", ""),
        ("/v1/completions", '{"prompt": ', "}"),
        ("/v1/completions", '{"prompt": [5], "metadata": ', "}"),
        ("/v1/completions", '{"prompt": [5], "structured_outputs": {"json": {"items": ', "}}}"),
        ("/v1/chat/completions", '{"messages": [{"role": "user", "content": ', "}]}"),
        ("/v1/chat/completions", '{"messages": [], "chat_template_kwargs": {"a": ', "}}"),
        ("/infill", '{"response_fields": ', "}"),
        ("/tokenize", '{"messages": ', "}"),
    ],
)
def test_nested_bodies_are_refused(path: str, head: str, tail: str, levels: int, server: Running) -> None:
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        inner = opening * levels + "1" + closing * levels
        response = server.http.post(path, content=head + inner + tail, headers={"Content-Type": "application/json"})
        assert response.status_code == 400, response.text
        assert re.search("expected at most 64 levels|expected JSON", response.json()["error"]["message"])


def test_a_body_of_many_parts_is_no_deep_one(server: Running) -> None:
    metadata: dict[str, Any] = {f"{i}": [{"a": [i]}] for i in range(300)}
    for _ in range(59):  # 64 with the body and those inside
        metadata = {"a": metadata}
    assert server.complete(prompt=[5], max_tokens=1, metadata=metadata)["choices"]


def test_large_bodies_are_refused(server: Running) -> None:
    assert "at most 20000 bytes" in server.refused(413, prompt="a" * 20_000)["message"]

    def parts() -> Iterator[bytes]:  # sent in chunks, with no length told before
        for _ in range(30):
            yield b"a" * 1000

    response = server.http.post("/v1/completions", content=parts(), headers={"Content-Type": "application/json"})
    assert response.status_code == 413


def test_only_names_of_this_machine(server: Running) -> None:
    for host in ("localhost:1", "127.0.0.1", "[::1]:8000"):
        assert server.http.get("/health", headers={"Host": host}).status_code == 200
    assert server.http.get("/health", headers={"Host": "rebound.example:8000"}).status_code == 403


def test_keys(folder: Path) -> None:
    with serving(folder, settings={"api_keys": ("first", "second")}) as server:
        assert server.complete(prompt="a", max_tokens=1)["choices"]
        for key in ("firs", "firstt", "Second", "first second"):
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
        wrong = {"Authorization": "Basic first"}
        for path in ("/metrics", "/v1/models"):
            response = server.http.get(path, headers=wrong)
            assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
        for path in ("/", "/health"):
            assert server.http.get(path, headers=wrong).status_code == 200


def test_rates(folder: Path) -> None:
    with serving(folder, settings={"requests_per_minute": 2}) as server:
        for _ in range(2):
            assert server.post("/tokenize", prompt="a").status_code == 200
        response = server.post("/tokenize", prompt="a")
        assert response.status_code == 429
        assert 1 <= int(response.headers["retry-after"]) <= 30
        assert server.http.get("/v1/models").status_code == 200


def test_buckets_fill_up_again() -> None:
    now = 0.0
    buckets = Buckets(60, lambda: now)
    assert [buckets.take("a") for _ in range(61)] == [0.0] * 60 + [pytest.approx(1.0)]
    assert buckets.take("b") == 0.0
    now = 0.5
    assert buckets.take("a") == pytest.approx(0.5)
    now = 1.0
    assert buckets.take("a") == 0.0
    now = 1e6
    assert [bool(buckets.take("a")) for _ in range(61)] == [False] * 60 + [True]


def test_a_full_queue_asks_to_come_again(folder: Path) -> None:
    """The client's own retries then get through."""
    with serving(folder, max_num_seqs=1, max_queued_requests=1) as server:
        slow_down(server.core, 0.05)
        patient = server.openai.with_options(max_retries=10)
        options: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 10, "extra_body": {"ignore_eos": True}}
        streams = []
        for _ in range(2):  # one that runs, one that waits
            streams.append(patient.completions.create(**options, stream=True))
            wait_for(lambda: server.core.stats().running == 1)
        response = server.post("/v1/completions", prompt="a")
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        assert "1 requests are waiting, of at most 1" in response.json()["error"]["message"]
        assert patient.completions.create(**options).choices[0].finish_reason == "length"
        for stream in streams:
            assert [c.choices[0].finish_reason for c in stream][-1] == "length"


def test_several_prompts_are_queued_all_or_none(folder: Path) -> None:
    with serving(folder, max_num_seqs=1, max_queued_requests=2, max_queued_tokens=20) as server:
        server.refused(400, prompt=[[5], [5], [999]])
        assert server.settled()
        slow_down(server.core, 0.02)
        with ThreadPoolExecutor() as pool:
            long = {"prompt": "a", "max_tokens": 40, "ignore_eos": True}
            runs = pool.submit(server.complete, **long)
            wait_for(lambda: server.core.stats().running == 1)
            waits = pool.submit(server.complete, **long)
            wait_for(lambda: server.core.stats().waiting == 1)
            more = pool.submit(server.complete, prompt=[[5] * 30, [6] * 30, [7]], max_tokens=1)
            wait_for(lambda: server.core.stats().waiting == 4)
            says = server.refused(503, prompt=["a", "a"])["message"]
            assert "4 requests are waiting, of at most 2" in says
            assert server.core.stats().waiting == 4
            assert runs.result()["usage"] == waits.result()["usage"]
            assert len(more.result()["choices"]) == 3


def test_an_empty_queue_takes_a_list_of_any_length(folder: Path) -> None:
    """Who has one prompt more than may wait would else be told to come again for ever."""
    with serving(folder, max_queued_requests=2, max_queued_tokens=20) as server:
        for prompts in ([[5, 6]] * 100, [[5] * 30, [6] * 30, [7]]):
            choices = server.complete(prompt=prompts, max_tokens=2, ignore_eos=True)["choices"]
            assert [c["finish_reason"] for c in choices] == ["length"] * len(prompts)


def test_requests_have_their_time(folder: Path) -> None:
    with serving(folder, settings={"request_seconds": 0.3, "body_seconds": 0.3}) as server:
        slow_down(server.core, 0.05)
        error = server.refused(504, prompt="a", max_tokens=100, ignore_eos=True)
        assert "within 0.3 seconds" in error["message"]
        with pytest.raises(openai.APIError, match=r"within 0\.3 seconds"):
            list(server.openai.completions.create(model="tiny", prompt="a", max_tokens=100, stream=True, seed=1,
                                                  extra_body={"ignore_eos": True}))  # fmt: skip
        wait_for(server.settled)
        with socket.create_connection(("127.0.0.1", server.port)) as slow:
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            slow.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            begin = time.monotonic()
            assert b" 408 " in slow.recv(1 << 16)
            assert 0.2 < time.monotonic() - begin < 5


BEGUN = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize("said", [b"", BEGUN, BEGUN + b"\r\n" + BEGUN])
def test_connections_on_which_nothing_is_asked_are_closed(said: bytes, folder: Path) -> None:
    with serving(folder, settings={"body_seconds": 0.3}) as server:
        begin = time.monotonic()
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as silent:
            silent.sendall(said)
            with contextlib.suppress(ConnectionResetError):
                while silent.recv(1 << 12):
                    pass
        assert 0.3 < time.monotonic() - begin < 5


def test_a_connection_on_which_much_is_asked_stays(folder: Path) -> None:
    with serving(folder, settings={"body_seconds": 0.3}) as server:
        busy = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        with busy, busy.makefile("rb") as answers:
            for _ in range(50):
                busy.sendall(BEGUN + b"\r\n")
                assert answers.readline() == b"HTTP/1.1 200 OK\r\n"
                while answers.readline() != b"\r\n":
                    pass
                answers.read(len('{"status":"ok"}'))
                time.sleep(0.02)


def test_settings_are_checked() -> None:
    for wrong, says in (
        ({"host": "0.0.0.0"}, "host: 0.0.0.0 can be reached from other machines: give an API key"),
        ({"port": 70_000}, "port"),
        ({"max_body_bytes": 0}, "max_body_bytes"),
        ({"requests_per_minute": 0}, "requests_per_minute"),
        ({"api_keys": ("",)}, "api_keys"),
        ({"drain_seconds": -1}, "drain_seconds"),
        ({"drain_seconds": float("inf")}, "drain_seconds"),
    ):
        with pytest.raises(ValueError, match=says):
            ServerSettings("m", **wrong)  # type: ignore[arg-type]
    assert not ServerSettings("m", host="0.0.0.0", api_keys=("k",)).loopback
    assert ServerSettings("m", host="::1").loopback
