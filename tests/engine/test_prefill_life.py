"""The prefill process's life: it ends with its engine, whatever ends that, and keeps nothing open."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from engine_cases import as_prompts, engine, prompts_of, write_model
from prefill_cases import pid_of, runs, worker_of

from fastsft.engine.request import SamplingParams
from fastsft.models.weights import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "qwen3", "qwen3")


def test_the_worker_ends_with_its_engine(folder: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    descriptors = len(os.listdir("/proc/self/fd"))
    llm = engine(folder, prefill_threads=1)
    llm.generate(as_prompts(prompts_of([40])), SamplingParams(max_tokens=2))
    pid = pid_of(worker_of(llm.core))
    assert len(os.listdir(f"/proc/{pid}/fd")) <= 4, "the worker keeps files of this process open"
    assert set(os.listdir("/dev/shm")) == before
    del llm
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_fork_of_the_program_does_not_end_the_worker(folder: Path) -> None:
    llm = engine(folder, prefill_threads=1)
    llm.generate(as_prompts(prompts_of([40])), SamplingParams(max_tokens=2))
    pid = pid_of(worker_of(llm.core))
    if (child := os.fork()) == 0:
        del llm
        os._exit(0)
    os.waitpid(child, 0)
    time.sleep(0.1)
    assert runs(pid)


def test_a_fork_of_the_program_may_not_use_the_engine(folder: Path) -> None:
    """It would write into the cache of this process, and talk to its worker."""
    prompts, one = as_prompts(prompts_of([100, 90, 50])), SamplingParams(max_tokens=20, ignore_eos=True)
    llm = engine(folder, prefill_threads=1)
    expected = llm.generate(prompts, one)
    ready, tell = os.pipe()
    uses = [
        lambda: llm.generate(as_prompts(prompts_of([200] * 4, seed=11)), one),
        lambda: llm.update_weights(load_model(folder)),
        lambda: llm.core.remove_adapter("none"),
    ]
    if (child := os.fork()) == 0:
        for use in uses:
            try:
                use()
            except Exception as error:
                os.write(tell, f"{type(error).__name__}: {error}\n".encode())
        os._exit(0)
    os.close(tell)
    with os.fdopen(ready) as lines:
        told = list(lines)
    os.waitpid(child, 0)
    refusal = (
        f"RuntimeError: engine with prefill_threads: expected to be used by the process that made it ({os.getpid()})"
    )
    assert [line.startswith(refusal) for line in told] == [True, True, False]
    assert llm.generate(prompts, one) == expected


def test_an_engine_that_outlives_its_modules_ends_in_silence(folder: Path) -> None:
    """What else holds it when the interpreter ends is not ours to say."""
    code = (
        "import sys, fastsft, torch, fastsft.engine.prefill\n"
        f"torch.kept, sys.kept = fastsft.LLM({str(folder)!r}, prefill_threads=1), fastsft.engine.prefill\n"
        "torch.kept.generate({'prompt_token_ids': [9] * 40}, fastsft.SamplingParams(max_tokens=2))\n"
        "print(torch.kept.core._handover.prefill.pid)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stderr == ""
    assert not runs(int(ended.stdout))


def test_the_worker_ends_when_its_engine_is_killed(folder: Path) -> None:
    ready, tell = os.pipe()
    engine_pid = os.fork()
    if engine_pid == 0:
        try:
            llm = engine(folder, prefill_threads=1)
            llm.generate(as_prompts(prompts_of([40])), SamplingParams(max_tokens=2))
            os.write(tell, f"{worker_of(llm.core).pid}\n".encode())
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(tell)
    with os.fdopen(ready) as lines:
        pid = int(lines.readline())
        os.kill(engine_pid, signal.SIGKILL)
        os.waitpid(engine_pid, 0)
    end = time.monotonic() + 10
    while runs(pid):
        assert time.monotonic() < end, "the worker outlives its engine"
        time.sleep(0.01)
