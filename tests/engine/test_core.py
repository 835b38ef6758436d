"""The engine's core as its fronts see it: updates that add up, aborts at any state, a bounded queue."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from engine_cases import SHAPE, as_prompts, assert_nothing_held, engine, prompts_of, tokenizer, write_model

from fastsft.engine.assemble import Assembly
from fastsft.engine.llm import LLM
from fastsft.engine.processors import ProcessorFactory
from fastsft.engine.request import QueueFull, Request, RequestError, RequestOutput, SamplingParams
from fastsft.models.weights import init_model, load_model

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
    core = engine(folder, max_num_seqs=1, max_queued_requests=2, max_queued_tokens=30).core
    core.add(request("large", [5] * 40))  # an empty queue takes any
    with pytest.raises(QueueFull, match="40 tokens are waiting, of at most 30"):
        core.add(request("a", [5]))
    core.step()
    core.add(request("a", [5] * 10))
    core.add(request("b", [5] * 19))
    with pytest.raises(QueueFull, match="2 requests are waiting, of at most 2"):
        core.add(request("c", [5]))
    assert core.abort("a")
    core.add(request("c", [5]))
    assert core.abort("large")
    assert core.abort("b")
    while core.busy:
        core.step()
    core.add(request("several", [5] * 3, n=3))
    core.step()  # one of them runs, two wait: they are one request
    core.add(request("d", [5]))


def test_a_list_longer_than_the_queue_is_taken_while_others_wait(folder: Path) -> None:
    """It would else wait for a queue that is empty by chance."""
    core = engine(folder, max_num_seqs=1, max_queued_requests=2, max_queued_tokens=30).core
    core.add(request("runs", [5] * 4))
    core.step()
    core.add(request("waits", [5] * 4))
    core.add(*(request(name, [5] * 20) for name in "abc"))
    assert core.stats().waiting == 4
    assert core.stats().waiting_tokens == 64
    with pytest.raises(QueueFull, match="4 requests are waiting, of at most 2"):
        core.add(request("d", [5]))
    while core.busy:
        core.step()


def test_requests_are_added_all_or_none(folder: Path) -> None:
    core = engine(folder, max_queued_requests=2).core
    core.add(*(request(name, [5]) for name in "abc"))  # an empty queue takes any number
    assert core.stats().waiting == 3
    with pytest.raises(QueueFull, match="3 requests are waiting, of at most 2"):
        core.add(request("d", [5]))
    while core.busy:
        core.step()
    before = core.stats()
    with pytest.raises(RequestError, match="got 999"):
        core.add(request("a", [5]), request("b", [999]))
    with pytest.raises(ValueError, match="request_id: expected a new one, got 'a'"):
        core.add(request("a", [5]), request("a", [6]))
    assert core.stats() == before
    assert not core.busy


def test_a_request_that_can_never_fit_is_refused_with_the_bytes(folder: Path) -> None:
    core = engine(folder, num_blocks=2).core  # of 3 layers * 2 * 2 heads * 32 * 4 bytes * 16 tokens
    with pytest.raises(RequestError, match=r"33 tokens .* holds 32 \(49152 bytes; needed: 73728\)"):
        core.add(request("a", [5] * 33))
    core.add(request("a", [5] * 31))
    with pytest.raises(ValueError, match="request_id: expected a new one, got 'a', which is in progress"):
        core.add(request("a", [5]))


def test_new_weights_without_a_reload(folder: Path) -> None:
    """In the middle of a request: what follows is what the new weights say after the tokens that are there."""
    old, new = load_model(folder), init_model(SHAPE | {"model_type": "llama"}, seed=6)
    llm = LLM(old, tokenizer(), num_blocks=64)
    one = request("x", prompts_of([40])[0], max_tokens=12, temperature=0.0, n=2)
    whole = Assembly(one)
    llm.core.add(one)
    for _ in range(5):
        for update in llm.core.step():
            whole.take(update)
    assert llm.update_weights(new) == 1
    run(llm, {"x": whole})
    prompt = list(one.prompt_token_ids)
    for output in whole.output().outputs:
        ids = list(output.token_ids)
        assert output.weight_versions == (0, 1)
        greedy = SamplingParams(max_tokens=12, ignore_eos=True)
        begun = LLM(old, tokenizer(), num_blocks=64).generate({"prompt_token_ids": prompt}, greedy)[0].outputs[0]
        assert ids[:5] == list(begun.token_ids[:5])
        rest = dataclasses.replace(greedy, max_tokens=7)
        ended = LLM(new, tokenizer(), num_blocks=64).generate({"prompt_token_ids": prompt + ids[:5]}, rest)[0]
        assert ids[5:] == list(ended.outputs[0].token_ids)
        assert ids != list(begun.token_ids)
    found = llm.core.stats().found_tokens
    again = llm.generate({"prompt_token_ids": prompt}, SamplingParams(max_tokens=1))[0]
    assert again.outputs[0].weight_versions == (1,)
    assert llm.core.stats().found_tokens == found + 32
    assert_nothing_held(llm)


def test_weights_in_place_and_weights_that_do_not_fit(folder: Path) -> None:
    """A trainer changes its model in place: the same decoder again, with what it holds now."""
    model = load_model(folder)
    llm = LLM(model, tokenizer(), num_blocks=64)
    prompt = as_prompts(prompts_of([20]))
    before = llm.generate(prompt)[0].outputs[0].token_ids
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    llm.update_weights(model)
    after = llm.generate(prompt)[0].outputs[0].token_ids
    assert after == LLM(model, tokenizer(), num_blocks=64).generate(prompt)[0].outputs[0].token_ids != before
    with pytest.raises(ValueError, match=r"update: model: expected num_hidden_layers=3, got 2"):
        llm.update_weights(init_model(SHAPE | {"model_type": "llama", "num_hidden_layers": 2}, seed=6))
    assert llm.generate(prompt)[0].outputs[0].token_ids == after


def test_generate_beside_requests_of_the_core(folder: Path) -> None:
    """A call steps those of others too; what that adds to them comes to who steps next."""
    prompts = prompts_of([20, 9, 14])
    long, short = SamplingParams(max_tokens=30, ignore_eos=True), SamplingParams(max_tokens=6, ignore_eos=True)
    alone = engine(folder)
    wanted = [
        alone.generate(as_prompts([p]), s)[0].outputs[0] for p, s in zip(prompts, (short, long, short), strict=True)
    ]
    llm = engine(folder)
    others = {name: Assembly(Request(name, tuple(prompts[i]), s)) for name, i, s in (("0", 0, short), ("1", 1, long))}
    for other in others.values():
        llm.core.add(other.request)
    assert llm.generate(as_prompts([prompts[2]]), short)[0].outputs[0] == wanted[2]
    assert llm.core.busy
    while llm.core.busy:
        for update in llm.core.step():
            others[update.request_id].take(update)
    assert [other.output().outputs[0] for other in others.values()] == wanted[:2]
    llm.core.add(others["0"].request)
    llm.generate(as_prompts([prompts[2]]), short)
    llm.core.abort("0")
    assert not llm.core.busy, "an aborted request's updates are still told"
    assert_nothing_held(llm)


def test_generate_inside_generate(folder: Path) -> None:
    prompts = as_prompts(prompts_of([20, 9, 14]))
    one = SamplingParams(max_tokens=8, ignore_eos=True, n=2, temperature=1.0, seed=4)
    wanted = engine(folder).generate(prompts, one)
    llm = engine(folder)
    inner: list[RequestOutput] = []

    def progress(done: int, total: int) -> None:
        if not inner:
            inner.extend(llm.generate(prompts[1:], one))

    assert llm.generate(prompts[:1], one, progress=progress) + inner == wanted
    assert not llm._pending
    assert_nothing_held(llm)


def test_progress_counts_what_is_drawn(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    several = [
        SamplingParams(n=1, best_of=4, temperature=1.0, seed=1, max_tokens=3, ignore_eos=True),
        SamplingParams(n=2, temperature=1.0, seed=1, max_tokens=5, ignore_eos=True),
    ]
    engine(folder).generate(
        as_prompts(prompts_of([9, 5])), several, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(0, 6), (0, 6), (4, 6), (4, 6), (6, 6)]


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(*arguments: object) -> None:
        raise AssertionError("processors were made")

    monkeypatch.setattr(ProcessorFactory, "make", make)
    core = engine(folder, num_blocks=2).core
    with pytest.raises(RequestError, match="leave no room"):
        core.add(request("a", [5] * 33, bad_words=["a"]))
    with pytest.raises(RequestError, match="adapter of the engine"):
        core.add(Request("a", (5,), SamplingParams(bad_words=["a"]), adapter="b"))
