"""Where a text ends, and which requests are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import VOCAB, as_prompts, assert_nothing_held, engine, prompts_of, tokenizer, write_model

from fastsft.engine.detokenize import Detokenizer
from fastsft.engine.llm import LLM
from fastsft.engine.request import SamplingParams
from fastsft.engine.sequence import Sequence
from fastsft.models.decoder import Decoder
from fastsft.models.weights import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "llama", "llama")


def sequence(**params: Any) -> Sequence:
    settings = SamplingParams(**({"max_tokens": 200} | params))
    return Sequence("0", 0, [9], 1, 201, settings, Detokenizer(tokenizer(), settings.skip_special_tokens), 0)


def feed(text: str, ends: tuple[int, ...] = (), **params: Any) -> Sequence:
    """Give a sequence the tokens of ``text`` one by one, each character its own, until it ends."""
    s = sequence(**params)
    for character in text:
        for token in tokenizer().encode(character):
            s.append(token, ends)
            if s.finish_reason:
                return s
    return s


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        ("END", "some ", "END"),
        (["no", "END", "E"], "some ", "E"),  # the shorter one is complete first
        (["ND t", "END th"], "some E", "ND t"),
        ("üb", "some END then ", "üb"),
        ("\n\n", "some END then über", "\n\n"),
        ("s", "", "s"),
    ],
)
def test_stop_string_across_tokens(stop: Any, text: str, reason: str) -> None:
    s = feed("some END then über\n\nmore", stop=stop)
    assert s.finish_reason == "stop"
    assert s.stop_reason == reason
    assert s.detokenizer.text == text
    fed = s.tokens[1:]
    assert tokenizer().decode(fed).endswith(reason), "the tokens stay, only the text is cut"


def test_stop_string_that_ends_inside_a_token(folder: Path) -> None:
    token = max(range(VOCAB), key=lambda t: len(tokenizer().decode([t], False)) if t > 8 else 0)
    text = tokenizer().decode([token])
    assert len(text) >= 3
    s = sequence(stop=text[1])
    s.append(token, ())
    assert s.detokenizer.text == text[:1]


def token_of(text: str) -> int:
    """A token that stands for all of ``text`` at once."""
    (token,) = tokenizer().encode(text)
    return token


@pytest.mark.parametrize("stops", [["e", "h"], ["h", "e"], ["e", "he", "h"], ["he", "h"]])
def test_several_stop_strings_in_one_token(stops: list[str]) -> None:
    """The token "the" completes them all; the text is cut as if it had come letter by letter."""
    s = sequence(stop=stops)
    s.append(token_of("the"), ())
    assert (s.detokenizer.text, s.stop_reason) == ("t", "h")


def test_of_stop_strings_completed_together_the_longest_wins() -> None:
    s = sequence(stop=["e", "he", "the"])
    s.append(token_of("the"), ())
    assert (s.detokenizer.text, s.stop_reason) == ("", "the")


class HalfToken:
    """A tokenizer with a token that ends in the middle of a character, as large byte-level vocabularies have."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        pieces = {1: b"END\xc3", 2: b"\xbcx", 3: b"", 4: b"a"}
        return b"".join(pieces[i] for i in ids).decode("utf-8", "replace")

    decode_inside = decode


@pytest.mark.parametrize(
    ("tokens", "limit"), [([4, 1], 3), ([4, 1, 3], 9), ([4, 1, 2], 9)], ids=["length", "end token", "completed"]
)
def test_stop_string_in_text_that_was_held_back(tokens: list[int], limit: int) -> None:
    """The detokenizer holds back a token with half a character; a stop string in it still counts at the end."""
    s = Sequence("0", 0, [9], 1, limit, SamplingParams(stop="END"), Detokenizer(HalfToken(), True), 0)  # type: ignore[arg-type]
    for token in tokens:
        assert s.finish_reason is None
        s.append(token, (3,))
    assert (s.detokenizer.text, s.finish_reason, s.stop_reason) == ("a", "stop", "END")


def test_the_token_that_ends_a_text_is_not_in_it() -> None:
    the, turn = token_of("the"), tokenizer().eos_ids[1]
    s = sequence(stop_token_ids=[the])
    for token in [*tokenizer().encode("cat"), the]:
        s.append(token, ())
    assert (s.detokenizer.text, s.stop_reason, s.tokens[-1]) == ("cat", the, the)
    s = sequence(skip_special_tokens=False)
    for token in [*tokenizer().encode("cat"), turn]:
        s.append(token, (turn,))
    assert s.detokenizer.text == "cat"


def test_stop_string_that_never_comes() -> None:
    s = feed("some text", stop="END", max_tokens=200)
    assert s.finish_reason is None


def test_stop_strings_wait_for_min_tokens() -> None:
    assert feed("abcabc", stop="bc", min_tokens=5).detokenizer.text == "abca"
    assert feed("abcabc", stop="bc").detokenizer.text == "a"


def test_end_tokens() -> None:
    end, turn = tokenizer().eos_ids
    s = sequence()
    s.append(turn, (end, turn))
    assert (s.finish_reason, s.stop_reason, tuple(s.tokens[1:])) == ("stop", turn, (turn,))
    s = sequence(ignore_eos=True)
    s.append(turn, (end, turn))
    assert s.finish_reason is None
    s = sequence(ignore_eos=True, stop_token_ids=[turn])
    s.append(turn, (end, turn))
    assert s.finish_reason == "stop"


def test_text_before_an_end_token_is_complete() -> None:
    """Bytes of a character that was never finished show as the decoder of the whole shows them."""
    partial = tokenizer().encode("é")[:1]
    end = tokenizer().eos_id or 0
    s = sequence()
    for token in [*tokenizer().encode("x"), *partial, end]:
        s.append(token, (end,))
    assert s.finish_reason == "stop"
    assert s.detokenizer.text == tokenizer().decode(s.tokens[1:]) == "x\ufffd"


def test_stop_in_generation_equals_cutting_the_free_text(folder: Path) -> None:
    llm = engine(folder)
    prompts = as_prompts(prompts_of([5, 9, 13]))
    params = {"temperature": 1.0, "seed": 5, "max_tokens": 40, "ignore_eos": True}
    free = [o.outputs[0].text for o in llm.generate(prompts, SamplingParams(**params))]
    stops = [t[len(t) // 2 : len(t) // 2 + 2] for t in free]
    each = [SamplingParams(**params, stop=s) for s in stops]
    for text, stop, out in zip(free, stops, llm.generate(prompts, each), strict=True):
        assert out.outputs[0].text == text[: text.index(stop)]
        assert out.outputs[0].stop_reason == stop
    assert_nothing_held(llm)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", r"prompts\[0\]: expected at least one token"),
        ({"prompt_token_ids": []}, r"prompts\[0\]: expected at least one token"),
        ({"prompt_token_ids": [VOCAB]}, rf"prompts\[0\]: expected token ids in \[0, {VOCAB}\), got {VOCAB}"),
        ({"prompt_token_ids": [3, -1]}, rf"prompts\[0\]: expected token ids in \[0, {VOCAB}\), got -1"),
        ({"prompt_token_ids": [3] * 80}, r"prompts\[0\]: 80 tokens leave no room .* the cache holds 80"),
        ({"text": "x"}, "prompt: expected a string or"),
        ({"prompt_token_ids": [1.5]}, "prompt: expected a string or .* got .*1.5"),
        ({"prompt_token_ids": None}, "prompt: expected a string or"),
        (["a", 5], "prompt: expected a string or .* got 5"),
        (["a", ""], r"prompts\[1\]: expected at least one token"),
    ],
)
def test_bad_prompt(prompt: Any, message: str, folder: Path) -> None:
    llm = engine(folder, num_blocks=5)
    with pytest.raises(ValueError, match=message):
        llm.generate(prompt)
    assert_nothing_held(llm)
    assert len(llm.generate("cat", SamplingParams(max_tokens=2, ignore_eos=True))[0].outputs[0].token_ids) == 2


def test_prompt_longer_than_the_context(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"256 tokens leave no room .* the model's context is 256"):
        engine(folder).generate({"prompt_token_ids": [3] * 256})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0), ("temperature", -1.0), ("temperature", float("nan")), ("temperature", float("inf")), ("top_k", -2),
        ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1), ("min_p", 1.5), ("seed", -1), ("seed", 2**62),
        ("max_tokens", 0), ("min_tokens", -1), ("min_tokens", 129), ("logprobs", -1), ("logprobs", 21), ("stop", [""]),
        ("n", "3"), ("n", True), ("n", 1.0), ("temperature", "hot"), ("temperature", True), ("top_p", None),
        ("min_p", []), ("top_k", 2**31), ("seed", 1.5), ("max_tokens", None), ("logprobs", "all"), ("ignore_eos", "no"),
        ("stop", None), ("stop", [5]), ("stop_token_ids", ["a"]), ("stop_token_ids", 5), ("skip_special_tokens", 1),
    ],
)  # fmt: skip
def test_bad_sampling_params(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"SamplingParams: {name}: expected"):
        SamplingParams(**{name: value})


def test_unknown_sampling_parameter() -> None:
    with pytest.raises(TypeError, match="length_penalty"):
        SamplingParams(length_penalty=1.1)  # type: ignore[call-arg]


def test_minus_one_is_all_tokens() -> None:
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)


def test_boolean_logprobs() -> None:
    assert SamplingParams(logprobs=True).logprobs == 0
    assert SamplingParams(logprobs=False).logprobs is None


def test_stop_token_outside_the_vocabulary(folder: Path) -> None:
    with pytest.raises(ValueError, match=rf"stop_token_ids: expected token ids in \[0, {VOCAB}\), got -5"):
        engine(folder).generate("cat", SamplingParams(stop_token_ids=[-5]))


@pytest.mark.parametrize(
    "name", ["num_blocks", "max_num_seqs", "max_batched_tokens", "max_queued_requests", "max_queued_tokens"]
)
def test_bad_engine_options(name: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=f"LLM: {name}: expected at least 1, got 0"):
        engine(folder, **{name: 0})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("block_size", 0, "a positive multiple of 16, got 0"),
        ("block_size", 24, "a positive multiple of 16, got 24"),
        ("dtype", torch.float16, "torch.float32 or torch.bfloat16, got torch.float16"),
        ("quantization", "int5", "one of None, int8, w8a8, int4, got 'int5'"),
        ("group_size", 128, "32 or 64, got 128"),
        ("kv_cache_dtype", "fp8", "one of auto, int8, got 'fp8'"),
    ],
)
def test_options_that_the_kernels_do_not_have(name: str, value: Any, expected: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=f"LLM: {name}: expected {expected}"):
        LLM(folder, **{name: value})


def test_contradicting_arguments(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"kv_cache_bytes: expected at least \d+, one block, got 10"):
        LLM(folder, kv_cache_bytes=10)
    with pytest.raises(ValueError, match=r"kv_cache_bytes: expected at most \d+, which cpu has memory for, got 1\d+"):
        LLM(folder, kv_cache_bytes=1 << 60)
    with pytest.raises(ValueError, match=r"num_blocks: expected at most \d+, which cpu has memory for, got 1\d+"):
        LLM(folder, num_blocks=1 << 40)
    with torch.device("meta"), pytest.raises(ValueError, match=r"LLM: device: expected cpu or cuda, got meta"):
        LLM(Decoder(load_model(folder).config), tokenizer())
    with pytest.raises(ValueError, match="tokenizer: needed beside a loaded model"):
        LLM(load_model(folder))
    llm = engine(folder)
    with pytest.raises(ValueError, match="params: expected 2, one per prompt, got 1"):
        llm.generate(["a", "b"], [SamplingParams()])
    with pytest.raises(ValueError, match="chat: messages: expected a list of at least one message"):
        llm.chat([])
    assert llm.generate([]) == []


def test_cache_size_from_bytes(folder: Path) -> None:
    llm = LLM(folder, kv_cache_bytes=1 << 20)
    held = llm.core._runner._cache.nbytes
    assert (1 << 20) - held < held // llm.core.stats().blocks
    assert held <= 1 << 20
