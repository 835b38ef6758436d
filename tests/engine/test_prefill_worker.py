"""Prompts computed by another process: the same results, no block let go too early, no worker's death untold."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import as_prompts, assert_nothing_held, engine, prompts_of, write_model
from fake_model import FakeDrafter, FakeRunner, FakeTokenizer, Interrupted, next_token

from fastsft.engine import prefill
from fastsft.engine.assemble import Assembly
from fastsft.engine.core import EngineCore
from fastsft.engine.llm import LLM
from fastsft.engine.prefill import PrefillWorker
from fastsft.engine.request import Request, SamplingParams
from fastsft.engine.runner import Inputs
from fastsft.models.adapter import save_adapter
from fastsft.models.lora import LoraConfig, add_lora, lora_layers
from fastsft.models.weights import load_model

# --- the core, with a worker that takes its time ----------------------------------------------------------------------


class Lost(RuntimeError):
    pass


class SlowPrefill:
    """Writes a job's tokens whenever it likes, until it says that it is done; dies at times."""

    def __init__(self, runner: FakeRunner, source: random.Random, deaths: float) -> None:
        self._runner, self._random, self._deaths = runner, source, deaths
        self._job: Inputs | None = None
        self.jobs = self.failures = 0

    def submit(self, inputs: Inputs) -> None:
        assert self._job is None, "two jobs at once"
        self._job = inputs
        self.jobs += 1

    def done(self, *, wait: bool) -> bool:
        assert self._job is not None, "no job"
        if self._random.random() < self._deaths:
            self._job = None
            raise Lost
        if not wait and self._random.random() < 0.7:
            return False
        self._runner.forward(self._job, torch.empty(0, dtype=torch.int64))
        self._job = None
        return True

    def renew(self, adapters: Iterable[Any] = ()) -> None:
        self._job = None


@pytest.mark.parametrize("seed", range(150))
def test_any_order_of_events_gives_the_same_tokens(seed: int) -> None:
    source = random.Random(seed)
    size = source.randint(1, 4)
    runner = FakeRunner(block_size=size, num_blocks=source.randint(-(-14 // size), 24))
    worker = SlowPrefill(runner, source, deaths=0.03 if seed % 3 == 0 else 0.0)
    core = EngineCore(
        runner, FakeTokenizer(), max_num_seqs=source.randint(1, 5),  # type: ignore[arg-type]
        max_batched_tokens=source.randint(1, 20), drafter=FakeDrafter(runner, seed) if seed % 2 else None,
        prefill=worker,
    )  # fmt: skip
    live: dict[str, Assembly] = {}
    ended = asked = aborted = 0
    while asked < 25 or core.busy:
        if asked < 25 and source.random() < 0.4:
            prompt = (*range(1, 1 + source.randint(0, 6)), source.randrange(7))
            params = SamplingParams(
                n=source.choice([1, 1, 2]), temperature=source.choice([0.0, 1.0]), seed=asked * 10, ignore_eos=True,
                max_tokens=source.randint(1, 14 - len(prompt)), prompt_logprobs=source.choice([None, None, 0]),
            )  # fmt: skip
            one = Assembly(Request(f"{asked}", prompt, params, source.choice([0, 0, 1])))
            core.add(one.request)
            live[one.request.request_id] = one
            asked += 1
        if live and source.random() < 0.05:
            core.abort(live.popitem()[0])
            aborted += 1
        runner.fail_next = seed % 3 == 1 and source.random() < 0.02  # half-way through a step, or a job
        try:
            updates = core.step()
        except (Lost, Interrupted):
            continue
        for update in updates:
            live[update.request_id].take(update)
        for name in [n for n, a in live.items() if a.finished == a.request.params.n]:
            one = live.pop(name)
            ended += 1
            for output in one.output().outputs:
                tokens, request = list(one.request.prompt_token_ids), one.request
                for place, token in enumerate(output.token_ids):
                    seed_ = (request.params.seed or 0) + output.index
                    assert token == next_token(0, tokens, request.params.temperature, seed_, place)
                    tokens.append(token)
    assert ended + aborted == asked
    assert worker.jobs
    assert not any(core._allocator._references)


def test_blocks_of_an_aborted_prompt_stay_until_the_worker_is_done() -> None:
    runner = FakeRunner(block_size=2, num_blocks=8)
    source = random.Random(0)
    worker = SlowPrefill(runner, source, 0.0)
    core = EngineCore(runner, FakeTokenizer(), prefill=worker)  # type: ignore[arg-type]
    core.add(Request("short", (1,), SamplingParams(max_tokens=4, ignore_eos=True)))
    while not core.stats().running:
        core.step()
    core.add(Request("long", (1, 2, 3, 4, 5, 6), SamplingParams(max_tokens=1)))
    source.random = lambda: 0.5  # type: ignore[method-assign]  # not done before it is waited for
    core.step()
    held = core.stats().free_blocks
    assert core.abort("long")
    assert core.stats().free_blocks == held
    core.abort("short")
    assert core.busy
    assert core.step() == []
    assert core.stats().free_blocks == 8
    assert not core.busy


def test_a_prompt_under_way_is_not_given_up_for_a_block() -> None:
    runner = FakeRunner(block_size=2, num_blocks=6)
    source = random.Random(0)
    source.random = lambda: 0.5  # type: ignore[method-assign]  # not done before it is waited for
    core = EngineCore(runner, FakeTokenizer(), prefill=SlowPrefill(runner, source, 0.0))  # type: ignore[arg-type]
    core.add(Request("short", (1,), SamplingParams(max_tokens=11, ignore_eos=True)))
    core.step()
    core.add(Request("long", (1, 2, 3, 4, 5, 6), SamplingParams(max_tokens=1)))
    ended = [u.request_id for _ in range(40) for u in core.step() if u.finish_reason]
    assert ended == ["long", "short"]
    assert core.stats().preemptions == 1
    assert core.stats().free_blocks == 6


# --- the process ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "qwen3", "qwen3")


@pytest.fixture(scope="module")
def adapters(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for seed, name in enumerate("ab"):
        model, found[name] = load_model(folder), tmp_path_factory.mktemp("adapter")
        add_lora(model, LoraConfig(rank=4), seed=seed)
        with torch.no_grad():
            for _, layer in lora_layers(model):
                layer.lora_B.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
        save_adapter(model, found[name])
    return found


def worker_of(llm: LLM) -> PrefillWorker:
    worker = llm.core._handover.prefill
    assert isinstance(worker, PrefillWorker)
    return worker


def requests() -> tuple[list[dict[str, Any]], list[SamplingParams], list[str | None]]:
    (trunk,) = prompts_of([64], seed=1)
    prompts = [
        trunk[:k] + end for k, end in zip([0, 20, 33, 64, 64, 64], prompts_of([1, 90, 7, 30, 2, 1]), strict=True)
    ]
    params = [
        SamplingParams(temperature=i % 2 * 1.0, seed=i, n=1 + i % 3, max_tokens=20, ignore_eos=True, logprobs=2)
        for i in range(6)
    ]
    return as_prompts(prompts), params, [None, "a", None, "b", "a", "b"]


@pytest.mark.parametrize(
    "options",
    [
        {}, {"max_batched_tokens": 13}, {"num_blocks": 24}, {"quantization": "w8a8", "kv_cache_dtype": "int8"},
        {"dtype": torch.bfloat16, "speculative_config": {"method": "ngram", "adaptive": False}, "prefill_threads": 2},
    ],
    ids=["wide", "chunks", "little room", "w8a8", "drafts"],
)  # fmt: skip
def test_the_results_are_those_of_one_process(options: dict[str, Any], folder: Path, adapters: dict[str, Path]) -> None:
    prompts, params, names = requests()
    plain = {k: v for k, v in options.items() if k != "prefill_threads"}
    expected = engine(folder, adapters=adapters, **plain).generate(prompts, params, adapter=names)
    llm = engine(folder, adapters=adapters, **{"prefill_threads": 1} | options)
    assert llm.generate(prompts, params, adapter=names) == expected
    assert worker_of(llm).pid is not None
    assert llm.generate(prompts, params, adapter=names) == expected
    assert_nothing_held(llm)


def test_new_weights_and_adapters_reach_the_worker(folder: Path, adapters: dict[str, Path]) -> None:
    prompts, params, _ = requests()
    model = load_model(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    found = []
    for threads in (0, 1):
        llm = engine(folder, prefill_threads=threads)
        outputs = [llm.generate(prompts, params)]
        llm.core.add_adapter("b", adapters["a"])
        outputs.append(llm.generate(prompts, params, adapter="b"))
        llm.update_weights(model)
        outputs += [llm.generate(prompts, params), llm.generate(prompts, params, adapter="b")]
        found.append(outputs)
        llm.core.remove_adapter("b")
        assert not threads or not worker_of(llm)._adapters
    assert found[0] == found[1]
    assert found[0][0] != found[0][2]


def kill(worker: PrefillWorker) -> int:
    pid = worker.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    return pid


@pytest.mark.parametrize("moment", ["idle", "before the job comes", "at the job"])
def test_a_killed_worker_is_replaced(
    moment: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No request notices: neither what runs, nor what the worker was at."""
    (prompt, long), one = prompts_of([40, 200]), SamplingParams(max_tokens=20, ignore_eos=True, logprobs=0)
    expected = engine(folder).generate(as_prompts([prompt, long]), one)
    llm = engine(folder, prefill_threads=1)
    core, worker = llm.core, worker_of(llm)
    core.add(Request("running", expected[0].prompt_token_ids, one))
    found: dict[str, Assembly] = {n: Assembly(Request(n, (), one)) for n in ("running", "long")}
    while found["running"].generated < 5:
        for update in core.step():
            found[update.request_id].take(update)
    killed = worker.pid
    assert killed is not None
    if moment == "idle":
        kill(worker)
        os.waitid(os.P_PID, killed, os.WEXITED | os.WNOWAIT)
    else:
        submit = worker.submit

        def submit_and_kill(inputs: Inputs) -> None:
            if moment == "at the job":  # it is taken, not finished: the process stands still
                os.kill(killed, signal.SIGSTOP)
                submit(inputs)
            kill(worker)
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
    assert worker_of(llm).pid is None
    now = time.monotonic()
    monkeypatch.setattr(prefill.time, "monotonic", lambda: now + 60)
    assert llm.generate(prompts, params, adapter=names) == expected
    assert worker_of(llm).pid is not None
    assert llm.core.stats().prefill_failures == 4
    assert_nothing_held(llm)


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


def test_the_worker_ends_with_its_engine(folder: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    descriptors = len(os.listdir("/proc/self/fd"))
    llm = engine(folder, prefill_threads=1)
    llm.generate(as_prompts(prompts_of([40])), SamplingParams(max_tokens=2))
    pid = worker_of(llm).pid
    assert pid is not None
    assert len(os.listdir(f"/proc/{pid}/fd")) <= 4, "the worker keeps files of this process open"
    assert set(os.listdir("/dev/shm")) == before
    del llm
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_worker_that_is_quicker_than_the_step_beside_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt may find blocks that the step which admits it fills: it must not be computed before them."""
    (first,) = prompts_of([31], 1)
    one = SamplingParams(max_tokens=1, ignore_eos=True)
    token = engine(folder).generate(as_prompts([first]), one)[0].outputs[0].token_ids
    second = [*first, *token, *prompts_of([40], 2)[0]]
    several = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=0)
    alone = engine(folder).generate(as_prompts([second]), several)[0].outputs[0]

    llm = engine(folder, prefill_threads=1)
    core, worker = llm.core, worker_of(llm)
    submit = worker.submit

    def submit_and_wait(inputs: Inputs) -> None:
        submit(inputs)
        assert worker._process is not None
        worker._process[1].poll(30)

    monkeypatch.setattr(worker, "submit", submit_and_wait)
    core.add(Request("first", tuple(first), SamplingParams(max_tokens=20, ignore_eos=True)))
    found = []
    while core.busy:
        updates = core.step()
        if not found and any(u.request_id == "first" for u in updates) and not core.stats().waiting:
            core.add(Request("second", tuple(second), several))
            found.append(None)
        found += [u for u in updates if u.request_id == "second"]
    logprobs = [p for u in found if u is not None for p in u.logprobs or ()]
    assert logprobs == list(alone.logprobs or ())
    assert core.stats().found_tokens == 32


def test_a_fork_of_the_program_does_not_end_the_worker(folder: Path) -> None:
    llm = engine(folder, prefill_threads=1)
    llm.generate(as_prompts(prompts_of([40])), SamplingParams(max_tokens=2))
    pid = worker_of(llm).pid
    assert pid is not None
    if (child := os.fork()) == 0:
        del llm
        os._exit(0)
    os.waitpid(child, 0)
    time.sleep(0.1)
    assert _runs(pid)


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
    assert not _runs(int(ended.stdout))


def test_the_worker_ends_when_its_engine_is_killed(folder: Path) -> None:
    ready, tell = os.pipe()
    engine_pid = os.fork()
    if engine_pid == 0:
        try:
            llm = engine(folder, prefill_threads=1)
            llm.generate(as_prompts(prompts_of([40])), SamplingParams(max_tokens=2))
            os.write(tell, f"{worker_of(llm).pid}\n".encode())
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(tell)
    with os.fdopen(ready) as lines:
        pid = int(lines.readline())
        os.kill(engine_pid, signal.SIGKILL)
        os.waitpid(engine_pid, 0)
    end = time.monotonic() + 10
    while _runs(pid):
        assert time.monotonic() < end, "the worker outlives its engine"
        time.sleep(0.01)


def test_a_server_with_a_worker(folder: Path) -> None:
    """It is forked from the engine's thread, while connections are open, which it must not keep."""
    pytest.importorskip("fastapi", reason="part of the serve extra")
    import httpx
    from serve_cases import serving

    prompts = prompts_of([60, 70, 80, 90])
    options = SamplingParams(max_tokens=10, temperature=1.0, seed=3)
    expected = [o.outputs[0].text for o in engine(folder).generate(as_prompts(prompts), options)]
    with serving(folder, prefill_threads=1) as server:
        body = {"prompt": prompts, "max_tokens": 10, "temperature": 1.0, "seed": 3}
        for _ in range(2):
            answer = httpx.post(f"{server.url}/v1/completions", json=body, headers={"Connection": "close"}, timeout=30)
            assert [c["text"] for c in answer.json()["choices"]] == expected
        worker = server.core._handover.prefill
        assert isinstance(worker, PrefillWorker)
        assert worker.pid is not None


def test_a_server_whose_worker_is_killed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("fastapi", reason="part of the serve extra")
    from serve_cases import serving

    prompts = prompts_of([60, 70, 80, 90], seed=3)
    options = SamplingParams(max_tokens=10, temperature=1.0, seed=3)
    expected = [o.outputs[0].text for o in engine(folder).generate(as_prompts(prompts), options)]
    with serving(folder, prefill_threads=1) as server:
        worker = server.core._handover.prefill
        assert isinstance(worker, PrefillWorker)
        for number, (prompt, text) in enumerate(zip(prompts, expected, strict=True)):
            answer = server.complete(prompt=prompt, max_tokens=10, temperature=1.0, seed=3)
            assert answer["choices"][0]["text"] == text
            assert server.metric("prefill_failures_total") == number
            kill(worker)
        assert server.metric("engine_failures_total") == 0


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def test_what_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="prefill_threads: expected 0, or on Linux a positive number, got -1"):
        engine(folder, prefill_threads=-1)
