"""What requests ask of their draws, through the engine: each against its definition."""

from __future__ import annotations

import json
import re
import time

import pytest
from engine_cases import VOCAB, as_prompts, engine, prompts_of, tokenizer, write_model

from fastsft.engine.guide import Guides, StructuredOutputs
from fastsft.engine.llm import LLM
from fastsft.engine.request import PromptError, SamplingParams

PROMPTS = as_prompts(prompts_of([5, 17]))


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return engine(write_model(tmp_path_factory.mktemp("model"), "llama"))


def ids(llm: LLM, **params: object) -> list[list[int]]:
    given = {"temperature": 1.0, "seed": 3, "max_tokens": 30, "ignore_eos": True} | params
    found = llm.generate(PROMPTS, SamplingParams(**given))  # type: ignore[arg-type]
    return [list(o.token_ids) for request in found for o in request.outputs]


def test_allowed_tokens(llm: LLM) -> None:
    assert {i for text in ids(llm, allowed_token_ids=[50, 60, 70]) for i in text} == {50, 60, 70}


def test_bias(llm: LLM) -> None:
    assert ids(llm, logit_bias={50: 100.0}) == [[50] * 30] * 2
    common = ids(llm)[0][0]
    assert all(common not in text for text in ids(llm, logit_bias={common: -100.0}))


def test_bad_words(llm: LLM) -> None:
    letters = [i for i in range(VOCAB) if len(tokenizer().decode([i])) == 1 and tokenizer().decode([i]).isalpha()]
    few = {"allowed_token_ids": [i for i in letters if tokenizer().decode([i]) in "abc"], "max_tokens": 60}

    def texts(**more: object) -> list[str]:
        return [tokenizer().decode(text) for text in ids(llm, **few, **more)]

    assert any("ab" in t for t in texts())
    barred = texts(bad_words=["ab", "c"])
    assert not any("ab" in t or "c" in t for t in barred)
    assert all("a" in t and "b" in t for t in barred)


def test_words_are_encoded_once_for_all_continuations(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, encode = [], llm.tokenizer.encode_text
    monkeypatch.setattr(llm.tokenizer, "encode_text", lambda texts, **k: encoded.append(texts) or encode(texts, **k))
    llm.generate("the cat", SamplingParams(n=16, max_tokens=1, bad_words=["only here"]))
    assert len(encoded) == 2  # with and without a space


def test_penalties(llm: LLM) -> None:
    ever = {"temperature": 0.0, "allowed_token_ids": list(range(40, 60)), "max_tokens": 20}
    assert all(len(set(text)) < 20 for text in ids(llm, **ever))
    # Each presence penalty of 2 outweighs the logits' spread here only together with the repetition penalty.
    for penalty in ({"presence_penalty": 2.0, "repetition_penalty": 100.0}, {"frequency_penalty": 2.0}):
        assert all(a != b for a, b in zip(ids(llm, **ever), ids(llm, **ever, **penalty), strict=True))


def test_reported_logprobs_are_of_the_unmodified_distribution(llm: LLM) -> None:
    plain = llm.generate(PROMPTS, SamplingParams(max_tokens=1, logprobs=20, ignore_eos=True))
    for prompt, request in zip(PROMPTS, plain, strict=True):
        (shown,) = request.outputs[0].logprobs or ()
        token, logprob = sorted(shown.items(), key=lambda item: item[1])[3]
        biased = llm.generate(prompt, SamplingParams(max_tokens=1, logprobs=2, logit_bias={token: 100.0}))[0].outputs[0]
        assert biased.token_ids == (token,)
        assert (biased.logprobs or ())[0][token] == logprob
        assert biased.cumulative_logprob == pytest.approx(logprob, rel=1e-5)


def test_an_empty_choice_ends_with_an_error_and_leaves_the_others(llm: LLM) -> None:
    params = [
        SamplingParams(allowed_token_ids=[0], min_tokens=3, max_tokens=5),
        SamplingParams(temperature=1.0, seed=3, max_tokens=30, ignore_eos=True),
    ]
    first, second = (request.outputs[0] for request in llm.generate(PROMPTS, params))
    assert (first.finish_reason, first.token_ids) == ("error", ())
    assert list(second.token_ids) == ids(llm)[1]


def test_best_of(llm: LLM) -> None:
    common = {"temperature": 1.0, "seed": 5, "max_tokens": 12, "logprobs": 0}
    drawn = llm.generate(PROMPTS[0], SamplingParams(n=6, **common))[0].outputs
    for one in drawn:
        assert one.cumulative_logprob == pytest.approx(
            sum(p[i] for p, i in zip(one.logprobs or (), one.token_ids, strict=True)), rel=1e-5
        )
    order = sorted(drawn, key=lambda o: -o.cumulative_logprob)
    best = llm.generate(PROMPTS[0], SamplingParams(n=2, best_of=6, **common))[0].outputs
    assert [o.token_ids for o in best] == [o.token_ids for o in order[:2]]
    assert [o.index for o in best] == [0, 1]


def test_the_best_of_several_is_none_that_could_not_go_on(llm: LLM) -> None:
    """After "a" nothing may follow, and what ends there has the greatest sum."""
    a, q = (llm.tokenizer.encode_text([c], continues=True)[0][0] for c in "aq")
    common = {"temperature": 4.0, "seed": 1, "max_tokens": 3, "allowed_token_ids": [a, q], "bad_words": ["aa", "aq"]}
    drawn = llm.generate(PROMPTS[0], SamplingParams(n=40, **common))[0].outputs
    whole = [one for one in drawn if one.finish_reason == "length"]
    assert 0 < len(whole) < len(drawn)
    greatest = max(one.cumulative_logprob for one in whole)
    assert greatest < max(one.cumulative_logprob for one in drawn)
    (best,) = llm.generate(PROMPTS[0], SamplingParams(n=1, best_of=40, **common))[0].outputs
    assert (best.finish_reason, best.cumulative_logprob) == ("length", greatest)


@pytest.mark.parametrize(
    "wrong",
    [
        {"repetition_penalty": 0.0}, {"presence_penalty": 3.0}, {"frequency_penalty": True}, {"logit_bias": {1: 101.0}},
        {"logit_bias": [1]}, {"allowed_token_ids": []}, {"bad_words": "a"}, {"bad_words": [""]}, {"best_of": 1, "n": 2},
        {"structured_outputs": 3}, {"structured_outputs": {"regex": "a"}, "min_tokens": 1},
        {"structured_outputs": {"regex": "a", "json": "{}"}}, {"structured_outputs": {"choice": []}},
        {"structured_outputs": {"regexp": "a"}}, {"temperature": 1e300}, {"temperature": 1e-50}, {"top_p": 1e-50},
        {"repetition_penalty": 1e-40}, {"repetition_penalty": 1e300}, {"stop": ["a"] * 257}, {"stop": "a" * 1025},
        {"bad_words": ["a"] * 257},
    ],
)  # fmt: skip
def test_wrong_parameters(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)) + "|StructuredOutputs"):
        SamplingParams(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["allowed_token_ids", "logit_bias", "stop_token_ids"])
def test_ids_that_the_model_lacks(llm: LLM, name: str) -> None:
    given: object = {VOCAB: 1.0} if name == "logit_bias" else [VOCAB]
    with pytest.raises(PromptError, match=f"{name}: .*{VOCAB}"):
        llm.generate(PROMPTS, SamplingParams(**{name: given}))  # type: ignore[arg-type]


# --- guided output --------------------------------------------------------------------------------------------------


def texts(llm: LLM, asked: dict[str, object], **params: object) -> list[str]:
    given = {"temperature": 1.0, "seed": 3, "max_tokens": 60, "structured_outputs": asked} | params
    found = llm.generate(PROMPTS, SamplingParams(**given))  # type: ignore[arg-type]
    assert all(o.finish_reason == "stop" for request in found for o in request.outputs)
    return [o.text for request in found for o in request.outputs]


def test_guides(llm: LLM) -> None:
    pytest.importorskip("llguidance")
    assert all(re.fullmatch("[ab]{3}-[0-9]{2}", t) for t in texts(llm, {"regex": "[ab]{3}-[0-9]{2}"}))
    assert all(t in ("cat", "mat") for t in texts(llm, {"choice": ["cat", "mat"]}, n=4))
    schema = {
        "type": "object",
        "properties": {"on": {"type": "boolean"}, "kind": {"enum": ["x", "y"]}},
        "required": ["on", "kind"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    for text in texts(llm, {"json": schema}):
        found = json.loads(text)
        assert isinstance(found["on"], bool)
        assert found["kind"] in ("x", "y")
    assert all(
        re.fullmatch(r"\(+x\)+", t) for t in texts(llm, {"grammar": 'start: "x" | "(" start ")"'}, n=2) if t != "x"
    )


def test_a_guide_that_cannot_be_compiled(llm: LLM) -> None:
    pytest.importorskip("llguidance")
    with pytest.raises(PromptError, match="structured_outputs: regex"):
        texts(llm, {"regex": "a("})


def test_a_guide_that_comes_to_its_limits_ends_its_own_text_alone(llm: LLM) -> None:
    pytest.importorskip("llguidance")
    guided = SamplingParams(max_tokens=4, structured_outputs={"regex": "(a{1000}){1000}"})
    plain = SamplingParams(max_tokens=4, ignore_eos=True)
    beside, alone = llm.generate(PROMPTS[:2], [guided, plain]), llm.generate(PROMPTS[1], plain)
    assert beside[0].outputs[0].finish_reason in ("error", "length")  # where its limits are is the library's
    assert beside[1].outputs[0].token_ids == alone[0].outputs[0].token_ids


def test_a_guide_that_takes_long_has_taken_it_when_it_is_there() -> None:
    pytest.importorskip("llguidance")
    guides = Guides(tokenizer(), VOCAB, (0,))
    asked = StructuredOutputs(regex="(a{1000}){300}")
    times = [time.perf_counter()]
    for _ in range(2):
        guides.guide(asked).allowed([])
        times.append(time.perf_counter())
    guide = guides.guide(StructuredOutputs(regex="(b{1000}){300}"))
    begin = time.perf_counter()
    guide.allowed([])
    first, again, prepared = times[1] - times[0], times[2] - times[1], time.perf_counter() - begin
    assert max(again, prepared) < 0.2 * first


def test_a_guide_without_the_library(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    monkeypatch.setattr(llm.core._admission._processors, "_guides", None)
    with pytest.raises(ImportError, match=re.escape("fastsft[guided]")):
        texts(llm, {"regex": "a"})


def test_structured_outputs_say_what_they_are() -> None:
    assert StructuredOutputs(choice=["a", "b"]).format_and_text() == ("choice", '["a", "b"]')
    assert StructuredOutputs(json={"type": "null"}).format_and_text() == ("json_schema", '{"type": "null"}')
