"""A step that is interrupted at any line of the engine has not happened: nothing is lost, told twice, or goes on past
its end, and no block stays behind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from engine_cases import VOCAB, as_prompts, assert_nothing_held, engine, prompts_of, write_model
from fake_model import FakeDrafter, FakeRunner, FakeTokenizer, Interrupted, next_token

import fastsft.engine.core
from fastsft.engine.assemble import Assembly
from fastsft.engine.core import EngineCore
from fastsft.engine.guide import Guide
from fastsft.engine.request import Request, SamplingParams

_ENGINE = str(Path(fastsft.engine.core.__file__).parent)


class AtLine:
    """Raises at the given line, counted from 0 over all that :meth:`watch` sees, of what the engine runs in a step."""

    def __init__(self, line: int) -> None:
        self.line, self.seen = line, 0

    def watch(self, call: Callable[[], Any]) -> Any:
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            return call()
        finally:
            sys.settrace(before)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        ours = frame.f_code.co_filename.startswith(_ENGINE) and frame.f_code.co_name != "step"
        return self._line if ours else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.seen += 1
            if self.seen == self.line + 1:
                raise Interrupted
        return self._line


def requests() -> list[Request]:
    return [
        Request("a", (1, 2, 3, 4, 5), SamplingParams(max_tokens=3, temperature=1.0, seed=1, n=2, logprobs=1)),
        Request("b", (1, 2, 3, 4, 6), SamplingParams(max_tokens=6, ignore_eos=True, seed=2, stop="zz")),
        Request("c", (6,), SamplingParams(max_tokens=2, temperature=1.0, seed=3), priority=-1),
    ]


def run(line: int, *, drafts: bool, blocks: int) -> tuple[AtLine, list[Assembly], EngineCore]:
    runner = FakeRunner(block_size=2, num_blocks=blocks)
    core = EngineCore(
        runner, FakeTokenizer(), max_batched_tokens=6, drafter=FakeDrafter(runner, 0) if drafts else None,  # type: ignore[arg-type]
    )  # fmt: skip
    asked = {request.request_id: Assembly(request) for request in requests()}
    for one in asked.values():
        core.add(one.request)
    at, steps = AtLine(line), 0
    while core.busy:
        try:
            updates = at.watch(core.step)
        except Interrupted:
            continue
        for update in updates:
            asked[update.request_id].take(update)
        steps += 1
        assert steps < 60, "no end"
    return at, list(asked.values()), core


@pytest.mark.parametrize(("drafts", "blocks"), [(False, 20), (True, 20), (True, 6)])
def test_at_any_line(drafts: bool, blocks: int) -> None:
    lines = run(-1, drafts=drafts, blocks=blocks)[0].seen
    assert lines > 1000
    for line in range(0, lines, 61):
        at, asked, core = run(line, drafts=drafts, blocks=blocks)
        assert at.seen > line
        for one in asked:
            params, prompt = one.request.params, one.request.prompt_token_ids
            assert one.finished == params.n
            for output in one.output().outputs:
                tokens = list(prompt)
                for place, token in enumerate(output.token_ids):
                    expected = next_token(0, tokens, params.temperature, (params.seed or 0) + output.index, place)
                    assert token == expected, line
                    tokens.append(token)
                assert len(output.token_ids) == params.max_tokens, line
                assert output.text == "".join("abcdefg"[i] for i in output.token_ids), line
                assert len(output.logprobs or ()) == (params.max_tokens if params.logprobs else 0), line
        stats = core.stats()
        assert stats.free_blocks == stats.blocks, line
        assert not any(core._allocator._references)
        assert not core._live


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.mark.parametrize("options", [{}, {"speculative_config": {"method": "ngram", "adaptive": False}}])
def test_guides_and_penalties_go_on_as_they_were(
    folder: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guide has followed a token, and nobody has noted it."""
    pytest.importorskip("llguidance", reason="part of the guided extra")
    llm = engine(folder, **options)
    prompts = prompts_of([30, 20])
    several = [
        SamplingParams(max_tokens=24, temperature=1.0, seed=3, structured_outputs={"regex": "(ab|cd|[0-9]x)+"}),
        SamplingParams(max_tokens=12, ignore_eos=True, repetition_penalty=1.3, allowed_token_ids=[*range(9, VOCAB, 3)]),
    ]
    alone = llm.generate(as_prompts(prompts), several)
    follow, seen = Guide.follow, 0

    def follow_and_fail(guide: Guide, token: int) -> bool:
        nonlocal seen
        seen += 1
        follow(guide, token)
        if seen == 3:
            raise Interrupted
        return True

    monkeypatch.setattr(Guide, "follow", follow_and_fail)
    asked = {f"{i}": Assembly(Request(f"{i}", tuple(p), several[i])) for i, p in enumerate(prompts)}
    for one in asked.values():
        llm.core.add(one.request)
    interrupted = 0
    while llm.core.busy:
        try:
            for update in llm.core.step():
                asked[update.request_id].take(update)
        except Interrupted:
            interrupted += 1
    assert interrupted == 1
    assert [one.output().outputs for one in asked.values()] == [o.outputs for o in alone]
    assert_nothing_held(llm)
