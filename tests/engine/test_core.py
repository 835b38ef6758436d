"""The engine's core as its fronts see it: updates that add up, aborts at any state, a bounded queue."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_cases import as_prompts, assert_nothing_held, engine, prompts_of, write_model

from fastsft.engine.assemble import Assembly
from fastsft.engine.llm import LLM
from fastsft.engine.load import load_core
from fastsft.engine.request import QueueFull, Request, RequestError, SamplingParams

DRAW = {"temperature": 1.0, "max_tokens": 30, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "llama", "llama")


def request(name: str, prompt: list[int], **params: object) -> Request:
    return Request(name, tuple(prompt), SamplingParams(**{**DRAW, **params}))  # type: ignore[arg-type]


def run(llm: LLM, assemblies: dict[str, Assembly]) -> None:
    while llm.core.busy:
        for update in llm.core.step():
            assemblies[update.request_id].take(update)


def test_updates_add_up_to_the_output(folder: Path) -> None:
    """Texts of updates are never taken back, although a stop string can begin in one and end in another."""
    llm = engine(folder)
    prompts = prompts_of([5, 17, 9, 30])
    free = [r.outputs[0].text for r in llm.generate(as_prompts(prompts), SamplingParams(seed=3, **DRAW))]  # type: ignore[arg-type]
    stops = [(text[9:14], text[3:6] + "\0", text[12:14] + "\0\0") for text in free]
    asked = [request(str(i), p, seed=3, stop=stops[i], logprobs=2) for i, p in enumerate(prompts)]
    assemblies = {r.request_id: Assembly(r) for r in asked}
    for one in asked:
        llm.core.add(one)
    run(llm, assemblies)
    for i, (one, text, stop) in enumerate(zip(asked, free, stops, strict=True)):
        (output,) = assemblies[str(i)].output().outputs
        assert output.text == text[: text.index(stop[0])]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop[0])
        whole = llm.generate({"prompt_token_ids": one.prompt_token_ids}, one.params)[0].outputs[0]
        assert (output.token_ids, output.text) == (whole.token_ids, whole.text)
        assert [len(shown) for shown in output.logprobs or ()] == [len(shown) for shown in whole.logprobs or ()]
    assert_nothing_held(llm)


@pytest.mark.parametrize("steps", range(8))
def test_abort_at_any_state(steps: int, folder: Path) -> None:
    """Waiting, half-way through the prompt, generating, about to fork: the others go on as if it had not been there."""
    llm = engine(folder, max_batched_tokens=10, max_num_seqs=3)
    prompts = prompts_of([12, 25, 4])
    alone = [llm.generate({"prompt_token_ids": p}, SamplingParams(n=2, seed=9, **DRAW))[0] for p in prompts]  # type: ignore[arg-type]
    assemblies = {}
    for i, p in enumerate(prompts):
        one = request(str(i), p, n=2, seed=9)
        assemblies[str(i)] = Assembly(one)
        llm.core.add(one)
    for _ in range(steps):
        for update in llm.core.step():
            assemblies[update.request_id].take(update)
    assert llm.core.abort("1")
    assert not llm.core.abort("1")
    while llm.core.busy:
        for update in llm.core.step():
            assert update.request_id != "1"
            assemblies[update.request_id].take(update)
    for i in (0, 2):
        assert assemblies[str(i)].output() == alone[i]
    assert_nothing_held(llm)


def test_the_queue_is_bounded_in_requests_and_tokens(folder: Path) -> None:
    core = load_core(folder, num_blocks=64, max_num_seqs=1, max_queued_requests=2, max_queued_tokens=30)
    core.add(request("large", [5] * 40))  # an empty queue takes any
    with pytest.raises(QueueFull, match="40 tokens are waiting, of at most 30; 1 more do not fit"):
        core.add(request("a", [5]))
    core.step()
    core.add(request("a", [5] * 10))
    with pytest.raises(QueueFull, match="10 tokens are waiting, of at most 30; 21 more do not fit"):
        core.add(request("b", [5] * 21))
    core.add(request("b", [5] * 20))
    with pytest.raises(QueueFull, match="2 requests are waiting, of at most 2"):
        core.add(request("c", [5]))
    assert core.abort("a")
    core.add(request("c", [5]))


def test_a_request_that_can_never_fit_is_refused_with_the_bytes(folder: Path) -> None:
    core = engine(folder, num_blocks=2).core  # of 3 layers * 2 * 2 heads * 32 * 4 bytes * 16 tokens
    with pytest.raises(RequestError, match=r"33 tokens .* holds 32 \(49152 bytes; needed: 73728\)"):
        core.add(request("a", [5] * 33))
    core.add(request("a", [5] * 31))
    with pytest.raises(ValueError, match="request_id: expected a new one, got 'a', which is in progress"):
        core.add(request("a", [5]))
