"""A prefill process that dies, fails or cannot be started: no request notices."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from engine_cases import as_prompts, assert_nothing_held, engine, prompts_of, write_model
from prefill_cases import pid_of, requests, runs, worker_of

from fastsft.engine import prefill
from fastsft.engine.assemble import Assembly
from fastsft.engine.request import Request, SamplingParams
from fastsft.engine.runner import Inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "qwen3", "qwen3")


@pytest.mark.parametrize("moment", ["idle", "before the job comes", "at the job"])
def test_a_killed_worker_is_replaced(
    moment: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No request notices: neither what runs, nor what the worker was at."""
    (prompt, long), one = prompts_of([40, 200]), SamplingParams(max_tokens=20, ignore_eos=True, logprobs=0)
    expected = engine(folder).generate(as_prompts([prompt, long]), one)
    llm = engine(folder, prefill_threads=1)
    core, worker = llm.core, worker_of(llm.core)
    core.add(Request("running", expected[0].prompt_token_ids, one))
    found: dict[str, Assembly] = {n: Assembly(Request(n, (), one)) for n in ("running", "long")}
    while found["running"].generated < 5:
        for update in core.step():
            found[update.request_id].take(update)
    killed = pid_of(worker)
    if moment == "idle":
        os.kill(pid_of(worker), signal.SIGKILL)
        os.waitid(os.P_PID, killed, os.WEXITED | os.WNOWAIT)
    else:
        submit = worker.submit

        def submit_and_kill(inputs: Inputs) -> None:
            if moment == "at the job":  # it is taken, not finished: the process stands still
                os.kill(killed, signal.SIGSTOP)
                submit(inputs)
            os.kill(pid_of(worker), signal.SIGKILL)
            if moment == "before the job comes":
                submit(inputs)

        monkeypatch.setattr(worker, "submit", submit_and_kill)
    core.add(Request("long", expected[1].prompt_token_ids, one))
    while core.busy:
        for update in core.step():
            found[update.request_id].take(update)
    assert [one.output().outputs for one in found.values()] == [e.outputs for e in expected]
    assert worker.pid not in (None, killed)
    assert core.stats().prefill_failures == 1
    assert "was killed by SIGKILL; its prompts are computed again, by another one" in caplog.text
    assert_nothing_held(llm)


def test_a_worker_that_ends_again_and_again(
    folder: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine computes its prompts, and tries another process when some time has passed."""
    prompts, params, names = requests()
    expected = engine(folder, adapters=adapters).generate(prompts, params, adapter=names)
    llm = engine(folder, adapters=adapters, prefill_threads=1)
    with monkeypatch.context() as broken:
        broken.setattr(prefill, "_work", lambda *_: os._exit(3))
        assert llm.generate(prompts, params, adapter=names) == expected
        assert llm.core.stats().prefill_failures == 4
        assert caplog.text.count("ended with code 3; its prompts are computed again") == 4
        assert caplog.text.count("in the engine's process for a while") == 1
    assert llm.generate(prompts, params, adapter=names) == expected
    assert worker_of(llm.core).pid is None
    now = time.monotonic()
    monkeypatch.setattr(prefill.time, "monotonic", lambda: now + 60)
    assert llm.generate(prompts, params, adapter=names) == expected
    assert worker_of(llm.core).pid is not None
    assert llm.core.stats().prefill_failures == 4
    assert_nothing_held(llm)


@pytest.mark.parametrize("alone", [False, True])
def test_a_worker_that_hangs_is_ended(
    alone: bool, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What runs goes on meanwhile; then the engine computes prompts, until the minute is over."""
    monkeypatch.setattr(prefill, "_PATIENCE", 0.3)
    monkeypatch.setattr(prefill, "_LOOK", 0.05)
    (short, long), one = prompts_of([40, 200]), SamplingParams(max_tokens=20, ignore_eos=True, logprobs=0)
    expected = engine(folder).generate(as_prompts([short, long]), one)
    llm = engine(folder, prefill_threads=1)
    core, worker = llm.core, worker_of(llm.core)
    assert llm.generate(as_prompts([short]), one) == expected[:1]
    hung = pid_of(worker)
    os.kill(hung, signal.SIGSTOP)
    rescue = threading.Timer(20, os.kill, (hung, signal.SIGCONT))
    rescue.start()
    found: dict[str, Assembly] = {n: Assembly(Request(n, (), one)) for n in ("long", "short")}
    if not alone:
        core.add(Request("short", tuple(short), one))
    core.add(Request("long", tuple(long), one))
    while core.busy:
        for update in core.step():
            found[update.request_id].take(update)
    rescue.cancel()
    assert found["long"].output().outputs == expected[1].outputs
    assert alone or found["short"].output().outputs == expected[0].outputs
    assert core.stats().prefill_failures == 1
    assert "used no processor time for 0 seconds and was killed; its prompts are computed again, in the" in caplog.text
    assert worker.pid is None
    assert not runs(hung)
    assert llm.generate(as_prompts([long]), one) == expected[1:]
    assert worker.pid is None
    assert_nothing_held(llm)


def test_a_slow_worker_does_not_hang(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "_PATIENCE", 0.2)
    monkeypatch.setattr(prefill, "_LOOK", 0.05)
    prompts, one = as_prompts(prompts_of([40])), SamplingParams(max_tokens=2, ignore_eos=True)
    expected = engine(folder).generate(prompts, one)
    llm, us = engine(folder, prefill_threads=1), os.getpid()
    forward = llm.core._runner.forward

    def slow(*arguments: Any) -> Any:
        end = time.process_time() + (0.8 if os.getpid() != us else 0)
        while time.process_time() < end:
            pass
        return forward(*arguments)

    monkeypatch.setattr(llm.core._runner, "forward", slow)
    assert llm.generate(prompts, one) == expected
    assert llm.core.stats().prefill_failures == 0


def test_a_worker_that_takes_no_job(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that is larger than what the kernel keeps for a reader who does not come."""
    monkeypatch.setattr(prefill, "_PATIENCE", 0.2)
    llm = engine(folder, prefill_threads=1)
    llm.generate(as_prompts(prompts_of([40])), SamplingParams(max_tokens=2, ignore_eos=True))
    worker, done = worker_of(llm.core), list[bytes]()
    hung = pid_of(worker)
    os.kill(hung, signal.SIGSTOP)
    rescue = threading.Timer(20, os.kill, (hung, signal.SIGKILL))
    rescue.start()
    monkeypatch.setattr(worker, "_compute", done.append)
    worker._begin(b"job" * 1_000_000)
    rescue.cancel()
    assert done == [b"job" * 1_000_000]
    assert "the prefill worker took no job for 0 seconds and was killed" in caplog.text
    assert not runs(hung)


def test_a_default_timeout_of_sockets_changes_nothing(folder: Path) -> None:
    """A job that is larger than what the kernel keeps waits until the worker has read its beginning."""
    socket.setdefaulttimeout(5.0)
    try:
        llm = engine(folder, prefill_threads=1)
        llm.generate(as_prompts(prompts_of([40])), SamplingParams(max_tokens=2, ignore_eos=True))
    finally:
        socket.setdefaulttimeout(None)
    process = worker_of(llm.core)._process
    assert process is not None
    assert os.get_blocking(process[1].fileno())


def test_a_process_that_cannot_be_started(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, params, _ = requests()
    expected = engine(folder).generate(prompts, params)
    llm = engine(folder, prefill_threads=1)

    def refuse() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(prefill.os, "fork", refuse)
    assert llm.generate(prompts, params) == expected
    assert llm.core.stats().prefill_failures == 4


def test_a_step_that_fails_in_the_worker(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is computed again by the engine, whose own error is what a caller sees."""
    prompts, params, _ = requests()
    expected = engine(folder).generate(prompts, params)
    llm, us, broken = engine(folder, prefill_threads=1), os.getpid(), []
    runner = llm.core._runner
    forward = runner.forward

    def failing(*arguments: Any) -> Any:
        if os.getpid() != us or broken:
            raise MemoryError("no room for scratch")
        return forward(*arguments)

    monkeypatch.setattr(runner, "forward", failing)
    assert llm.generate(prompts, params) == expected
    assert llm.core.stats().prefill_failures > 0
    assert "MemoryError: no room for scratch" in caplog.text
    broken.append(True)
    with pytest.raises(MemoryError):
        llm.generate(prompts, params)
    broken.clear()
    assert llm.generate(prompts, params) == expected
    assert_nothing_held(llm)


def test_a_server_whose_worker_is_killed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("fastapi", reason="part of the serve extra")
    from serve_cases import serving

    prompts = prompts_of([60, 70, 80, 90], seed=3)
    options = SamplingParams(max_tokens=10, temperature=1.0, seed=3)
    expected = [o.outputs[0].text for o in engine(folder).generate(as_prompts(prompts), options)]
    with serving(folder, prefill_threads=1) as server:
        worker = worker_of(server.core)
        for number, (prompt, text) in enumerate(zip(prompts, expected, strict=True)):
            answer = server.complete(prompt=prompt, max_tokens=10, temperature=1.0, seed=3)
            assert answer["choices"][0]["text"] == text
            assert server.metric("prefill_failures_total") == number
            os.kill(pid_of(worker), signal.SIGKILL)
        assert server.metric("engine_failures_total") == 0
