"""The server's answers: the same as the engine's own, in the shapes that OpenAI's client and editors read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from engine_cases import FAMILIES, SHAPE, Reference, adapted, tokenizer, write_model
from serve_cases import MODEL, Running, serving
from tokenizer_cases import family

from fastsft.engine.llm import LLM
from fastsft.engine.request import SamplingParams
from fastsft.engine.server.pieces import Pieces
from fastsft.models.weights import init_model, save_model

TEXTS = ["the cat sat on", "on the mat the cat", "x = 1\n"]
DRAW: dict[str, Any] = {"temperature": 1.0, "seed": 7, "max_tokens": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("served") / "llama", "llama")


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, num_blocks=64)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with serving(folder) as running:
        yield running


def test_completions_are_the_engines(server: Running, llm: LLM) -> None:
    expected = llm.generate(TEXTS, SamplingParams(n=2, **DRAW))
    answer = server.openai.completions.create(model=MODEL, prompt=TEXTS, n=2, **DRAW)
    assert answer.object == "text_completion"
    assert [c.index for c in answer.choices] == list(range(6))
    outputs = [o for one in expected for o in one.outputs]
    assert [(c.text, c.finish_reason) for c in answer.choices] == [(o.text, o.finish_reason) for o in outputs]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(one.prompt_token_ids) for one in expected)
    assert answer.usage.completion_tokens == sum(len(o.token_ids) for o in outputs)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_prompts_may_be_ids(server: Running) -> None:
    ids = [tokenizer().encode(text) for text in TEXTS]
    texts = [c.text for c in server.openai.completions.create(model=MODEL, prompt=TEXTS, **DRAW).choices]
    assert [c.text for c in server.openai.completions.create(model=MODEL, prompt=ids, **DRAW).choices] == texts
    assert server.openai.completions.create(model=MODEL, prompt=ids[1], **DRAW).choices[0].text == texts[1]


def test_streams_add_up(server: Running) -> None:
    options: dict[str, Any] = {"model": MODEL, "prompt": TEXTS, "n": 2, "logprobs": 2, **DRAW}
    whole = server.openai.completions.create(**options)
    chunks = list(server.openai.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        assert [c.finish_reason for c in mine if c.finish_reason] == [choice.finish_reason]
        assert choice.logprobs is not None
        for name in ("tokens", "token_logprobs", "top_logprobs"):
            parts = [item for c in mine for item in getattr(c.logprobs, name)]
            if name == "token_logprobs":
                assert parts == pytest.approx(choice.logprobs.token_logprobs, abs=1e-4)
            elif name == "tokens":
                assert parts == choice.logprobs.tokens
            else:
                assert [sorted(p) for p in parts] == [sorted(p) for p in choice.logprobs.top_logprobs or ()]
    assert len({c.id for c in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(c.usage is None for c in chunks[:-1])


def test_a_stream_is_server_sent_events(server: Running) -> None:
    body = {"model": MODEL, "prompt": TEXTS[0], "stream": True, **DRAW}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        text = response.read().decode()
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        assert json.loads(event.removeprefix("data: "))["object"] == "text_completion"


def test_echo_repeats_the_prompt(server: Running) -> None:
    plain = server.complete(prompt=TEXTS, **DRAW)
    echoed = server.complete(prompt=TEXTS, echo=True, **DRAW)
    expected = [text + c["text"] for text, c in zip(TEXTS, plain["choices"], strict=True)]
    assert [c["text"] for c in echoed["choices"]] == expected
    alone = server.complete(prompt=TEXTS[0], echo=True, max_tokens=0)
    assert (alone["choices"][0]["text"], alone["usage"]["completion_tokens"]) == (TEXTS[0], 0)


def test_an_echo_is_the_prompt_as_it_came(tmp_path: Path) -> None:
    """Of a vocabulary that puts BOS and a space before a text, neither of which is in it."""
    words = family("prepend")
    save_model(init_model(SHAPE | FAMILIES["llama"] | {"vocab_size": words.vocab_size}, seed=5), tmp_path)
    words.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    with serving(tmp_path) as server:
        text = "def sub(x, y):"
        choice = server.complete(prompt=text, echo=True, logprobs=1, max_tokens=0)["choices"][0]
        assert choice["text"] == text
        places = list(zip(choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"], strict=True))
        assert places[0] == (0, "<s>")
        assert places[1][0] == 0
        assert "".join(token for _, token in places[1:]) == " " + text
        assert all(text[at : at + len(token)] == token for at, token in places[2:])
        plain = server.complete(prompt="def add", **DRAW)["choices"][0]["text"]
        assert server.complete(prompt="def add", echo=True, **DRAW)["choices"][0]["text"] == "def add" + plain


def test_best_of_returns_the_most_probable(server: Running, llm: LLM) -> None:
    params = SamplingParams(n=2, best_of=5, **DRAW)
    expected = [o.text for one in llm.generate(TEXTS, params) for o in one.outputs]
    answer = server.openai.completions.create(model=MODEL, prompt=TEXTS, n=2, best_of=5, **DRAW)
    assert [(c.index, c.text) for c in answer.choices] == list(enumerate(expected))
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 2 * 2 * 3


def test_a_bias_reaches_the_draw(server: Running) -> None:
    answer = server.openai.completions.create(model=MODEL, prompt="a", max_tokens=3, logit_bias={"70": 100})
    assert answer.choices[0].text == tokenizer().decode([70] * 3)


def test_adapters_are_called_by_their_names(folder: Path) -> None:
    model = adapted(folder, seed=0)
    llm = LLM(folder, num_blocks=64, adapters={"tuned": model})
    params = SamplingParams(max_tokens=12)
    plain, tuned = (llm.generate(TEXTS[0], params, adapter=a)[0].outputs[0].text for a in (None, "tuned"))
    assert plain != tuned
    with serving(folder, adapters={"tuned": model}) as server:
        for name, text in ((MODEL, plain), ("tuned", tuned)):
            answer = server.complete(model=name, prompt=TEXTS[0], max_tokens=12, temperature=0)
            assert (answer["model"], answer["choices"][0]["text"]) == (name, text)
        assert [m.id for m in server.openai.models.list()] == [MODEL, "tuned"]
        assert "expected 'tiny' or 'tuned'" in server.refused(404, model="other", prompt="a")["message"]


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_guesses_change_no_answer(method: str, server: Running, folder: Path) -> None:
    sampled = method == "draft_model"  # what is drawn from a random model's distribution repeats nothing
    config = {"method": method, "adaptive": False, **({"model": str(folder)} if sampled else {})}
    body: dict[str, Any] = {"prompt": TEXTS, "n": 2, "seed": 7, "temperature": float(sampled), "logprobs": 1}
    body |= {"max_tokens": 40, "ignore_eos": True}
    expected = server.complete(**body)["choices"]
    with serving(folder, speculative_config=config) as guessing:
        whole = guessing.complete(**body)
        assert whole["choices"] == expected
        guesses = whole["usage"]["completion_tokens_details"]
        assert whole["usage"]["completion_tokens"] == 40 * len(expected)
        counted = [guessing.metric(f"spec_decode_num_{kind}_tokens_total") for kind in ("draft", "accepted")]
        assert [sum(guesses.values()), guesses["accepted_prediction_tokens"]] == counted
        assert counted[1] > 0
        messages: list[Any] = [{"role": "user", "content": "the cat"}]
        asked: dict[str, Any] = {"model": MODEL, "messages": messages, "max_tokens": 40, "seed": 7}
        asked |= {"temperature": float(sampled), "extra_body": {"ignore_eos": True}}
        chat = guessing.openai.chat.completions.create(**asked)
        *_, last = guessing.openai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        assert chat.usage == last.usage
        assert chat.usage.completion_tokens_details is not None
        texts, tokens = [""] * len(expected), [0] * len(expected)
        response = guessing.post("/v1/completions", **body, stream=True)
        for event in response.text.split("\n\n")[:-2]:
            (choice,) = json.loads(event.removeprefix("data: "))["choices"]
            texts[choice["index"]] += choice["text"]
            tokens[choice["index"]] += len(choice["logprobs"]["tokens"])
        assert texts == [c["text"] for c in expected]
        assert tokens == [40] * len(expected)


def test_an_answer_can_be_held_to_a_schema(server: Running) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "one", "schema": schema}}
    answer = server.openai.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "a"}], response_format=wanted, max_tokens=60, seed=1
    )
    assert json.loads(answer.choices[0].message.content or "")["a"] in (1, 2)
    chosen = server.complete(prompt="a", structured_outputs={"choice": ["the cat", "the mat"]}, max_tokens=20)
    assert chosen["choices"][0]["text"] in ("the cat", "the mat")


def test_echoed_logprobs_score_the_prompt(server: Running, folder: Path) -> None:
    """As lm-eval asks for them: ids, one token more, the most probable one beside each."""
    prompts = [tokenizer().encode(text) for text in [*TEXTS, "the mat " * 40]]
    model = Reference(folder)
    for stream in (False, True):
        body = {"prompt": prompts, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True, "temperature": 0}
        if stream:
            shown: list[Any] = [{"logprobs": {"token_logprobs": [], "top_logprobs": []}} for _ in prompts]
            for chunk in server.openai.completions.create(model=MODEL, stream=True, **body):  # type: ignore[call-overload]
                for name, parts in shown[chunk.choices[0].index]["logprobs"].items():
                    parts += getattr(chunk.choices[0].logprobs, name)
        else:
            shown = server.complete(**body)["choices"]
        for ids, choice in zip(prompts, shown, strict=True):
            found = choice["logprobs"]
            expected = model.logprobs(ids)
            own = [float(expected[t, i]) for t, i in enumerate(ids[1:])]
            assert found["token_logprobs"][0] is None
            assert found["token_logprobs"][1:-1] == pytest.approx(own, abs=1e-4)
            best = expected.max(-1).values.tolist()
            assert [max(top.values()) for top in found["top_logprobs"][1:]] == pytest.approx(best, abs=1e-4)
            assert len(found["token_logprobs"]) == len(ids) + 1


def test_chat_is_the_engines(server: Running, llm: LLM) -> None:
    messages: list[Any] = [{"role": "system", "content": "cat"}, {"role": "user", "content": "the mat"}]
    expected = llm.chat(messages, SamplingParams(n=2, logprobs=3, **DRAW))[0]
    options: dict[str, Any] = {"model": MODEL, "n": 2, "logprobs": True, "top_logprobs": 3, **DRAW}
    answer = server.openai.chat.completions.create(messages=messages, **options)
    parts: list[Any] = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    chunks = list(server.openai.chat.completions.create(messages=parts, stream=True, **options))
    for choice, output in zip(answer.choices, expected.outputs, strict=True):
        assert (choice.message.role, choice.message.content) == ("assistant", output.text)
        assert choice.finish_reason == output.finish_reason
        assert choice.logprobs is not None
        entries = choice.logprobs.content or []
        assert output.logprobs is not None
        chosen = [shown[t] for t, shown in zip(output.token_ids, output.logprobs, strict=True)]
        assert [e.logprob for e in entries] == pytest.approx(chosen, abs=1e-4)
        assert all(len(e.top_logprobs) == 3 for e in entries)
        best = [sorted(shown.values(), reverse=True)[:3] for shown in output.logprobs]
        assert [[t.logprob for t in e.top_logprobs] for e in entries] == [pytest.approx(b, abs=1e-4) for b in best]
        mine = [c.choices[0] for c in chunks if c.choices[0].index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in mine) == output.text
        assert mine[-1].finish_reason == output.finish_reason
    assert server.openai.chat.completions.create(model=MODEL, messages=messages, temperature=0).usage is not None


def test_bytes_of_tokens_make_the_text(server: Running) -> None:
    """Also where a character is spread over several tokens, whose texts alone say nothing."""
    answer = server.openai.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "é"}], logprobs=True, extra_body={"ignore_eos": True}, **DRAW
    )
    assert answer.choices[0].logprobs is not None
    entries = answer.choices[0].logprobs.content or []
    whole = b"".join(bytes(e.bytes or []) for e in entries)
    special = [t for t in tokenizer().control.names if t.encode() in whole]
    for token in special:
        whole = whole.replace(token.encode(), b"")
    assert whole.decode(errors="replace") == answer.choices[0].message.content
    echoed = server.complete(prompt="aé", max_tokens=0, echo=True, logprobs=1)["choices"][0]
    assert echoed["logprobs"]["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    ids = tokenizer().encode("aé")
    assert [Pieces(tokenizer()).piece(i)[1] for i in ids] == [b"a", b"\xc3", b"\xa9"]


def test_the_chosen_token_is_among_the_top_ones(server: Running) -> None:
    """As OpenAI's reference has it of completions: up to one more than was asked for."""
    found = server.complete(prompt=TEXTS[0], logprobs=2, **DRAW)["choices"][0]["logprobs"]
    for token, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert top[token] == logprob
        assert len(top) in (2, 3)


@pytest.mark.parametrize("skip", [True, False])
def test_offsets_are_places_in_the_text(skip: bool, server: Running) -> None:
    """Also after a character of several tokens, with tokens that the text leaves out, and where text is held back."""
    ids = [tokenizer().token_id("<|im_start|>"), *tokenizer().encode("aé€ cat")]
    body = {"prompt": "aé cat", "echo": True, "logprobs": 1, "max_tokens": 40, "seed": 3, "temperature": 9.0}
    body |= {"allowed_token_ids": ids, "stop": ["cat cat cat cat", "aaaaa"], "skip_special_tokens": skip}
    choice = server.complete(**body)["choices"][0]
    text, shown = choice["text"], choice["logprobs"]
    assert "\ufffd" in text
    hidden = "<|im_start|>" if skip else None
    for at, token in zip(shown["text_offset"], shown["tokens"], strict=True):
        assert token == hidden or token.startswith("bytes:") or text[at : at + len(token)] == token
    assert {"a", " cat", "<|im_start|>"} <= set(shown["tokens"])
    events = server.post("/v1/completions", **body, stream=True).text.split("\n\n")[:-2]
    parts = [json.loads(event.removeprefix("data: "))["choices"][0]["logprobs"] for event in events]
    assert [at for part in parts for at in part["text_offset"]] == shown["text_offset"]


def test_suffix_and_infill_fill_the_middle(server: Running, llm: LLM) -> None:
    expected = llm.infill("the cat ", " the mat", SamplingParams(max_tokens=12)).outputs[0]
    given = server.openai.completions.create(
        model=MODEL, prompt="the cat ", suffix=" the mat", max_tokens=12, temperature=0
    )
    assert given.choices[0].text == expected.text
    body = {"input_prefix": "the cat ", "input_suffix": " the mat", "n_predict": 12, "cache_prompt": True}
    found = server.post("/infill", **body).json()
    assert (found["content"], found["tokens_predicted"]) == (expected.text, len(expected.token_ids))
    assert found["stop_type"] == ("limit" if expected.finish_reason == "length" else "eos")
    chosen = server.post("/infill", **body, response_fields=["content", "timings/prompt_n", "nothing"]).json()
    assert chosen == {"content": expected.text, "timings/prompt_n": found["tokens_evaluated"]}
    with server.http.stream("POST", "/infill", json={**body, "stream": True}) as response:
        events = [json.loads(e.removeprefix("data: ")) for e in response.read().decode().split("\n\n") if e]
    assert "".join(e["content"] for e in events) == expected.text
    assert [e["stop"] for e in events] == [False] * (len(events) - 1) + [True]


def test_an_editor_may_have_its_files_read_ahead(folder: Path) -> None:
    body = {"input_prefix": "the cat sat on " * 4, "input_suffix": "a"}
    with serving(folder) as server:
        read = server.post("/infill", **body, n_predict=0).json()
        assert (read["content"], read["tokens"], read["stop_type"]) == ("", [], "limit")
        assert server.core.stats().found_tokens == 0
        assert len(server.post("/infill", **body, n_predict=3, ignore_eos=True).json()["tokens"]) == 3
        assert server.core.stats().found_tokens > 0


def test_infill_begins_the_middle_and_names_other_files(server: Running, llm: LLM) -> None:
    prompt = tokenizer().encode("<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>the ")
    snippet = tokenizer().encode("\n\n--- snippet ---\n\nthe mat")
    expected = llm.generate({"prompt_token_ids": snippet + prompt}, SamplingParams(max_tokens=6, ignore_eos=True))[0]
    body = {"input_prefix": "a", "input_suffix": "b", "prompt": "the ", "n_predict": 6, "ignore_eos": True}
    found = server.post("/infill", **body, input_extra=[{"filename": "m", "text": "the mat"}]).json()
    assert found["tokens"] == list(expected.outputs[0].token_ids)


def test_tokens_there_and_back(server: Running) -> None:
    ids = tokenizer().encode("the cat")
    assert server.post("/tokenize", prompt="the cat").json() == {"tokens": ids, "count": len(ids), "max_model_len": 256}
    assert server.post("/tokenize", content="the cat").json()["tokens"] == ids
    assert server.post("/detokenize", tokens=ids).json()["prompt"] == "the cat"
    chat = server.post("/tokenize", messages=[{"role": "user", "content": "hi"}]).json()["tokens"]
    assert chat == tokenizer().encode_chat([{"role": "user", "content": "hi"}], add_generation_prompt=True)


def test_models_and_health(server: Running) -> None:
    assert [m.id for m in server.openai.models.list()] == [MODEL]
    assert server.openai.models.retrieve(MODEL).id == MODEL
    assert server.http.get("/health").json() == {"status": "ok"}
    with pytest.raises(openai.NotFoundError, match="expected 'tiny', got 'gpt'"):
        server.openai.completions.create(model="gpt", prompt="x")


def test_metrics_count(server: Running) -> None:
    names = ("prompt_tokens_total", "generation_tokens_total", "request_success_total",
             "time_to_first_token_seconds_count", "inter_token_latency_seconds_count")  # fmt: skip
    before = [server.metric(name) for name in names]
    usage = server.complete(prompt=TEXTS, n=2, ignore_eos=True, **DRAW)["usage"]
    after = [server.metric(name) for name in names]
    generated = usage["completion_tokens"]
    expected = [usage["prompt_tokens"], generated, 6, 6, generated - 6]
    assert [b - a for a, b in zip(before, after, strict=True)] == expected
    assert server.metric("kv_cache_usage_perc") == 0
