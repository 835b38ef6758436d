"""Tokens pushed one by one give the text that all of them give, and a push costs the same however many came before."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from engine_cases import FAMILIES, SHAPE, VOCAB, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_cases import SPACED, family

from fastsft.engine.detokenize import Detokenizer
from fastsft.engine.llm import LLM
from fastsft.engine.request import SamplingParams
from fastsft.models.weights import init_model

BYTES = [i for i in range(VOCAB) if tokenizer().decode([i], False) == "\ufffd"]  # parts of characters
CHARACTERS = st.sampled_from("aé€😀\ufffd").map(lambda c: tokenizer().encode_text([c], continues=True)[0])
GARBAGE = st.lists(st.sampled_from(BYTES), max_size=30)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(CHARACTERS, GARBAGE), max_size=12), st.booleans())
def test_any_bytes(parts: list[list[int]], skip: bool) -> None:
    ids = [i for part in parts for i in part]
    detokenizer, before = Detokenizer(tokenizer(), skip), ""
    for token in ids:
        detokenizer.push(token)
        assert detokenizer.text.startswith(before)
        before = detokenizer.text
    detokenizer.flush()
    assert detokenizer.text == tokenizer().decode(ids, skip)


class Counting:
    def __init__(self) -> None:
        self.decoded = 0

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        self.decoded += len(ids)
        return tokenizer().decode(ids, skip_special_tokens)

    decode_inside = decode


def test_what_is_never_complete_is_shown_and_costs_no_more_in_the_end() -> None:
    counting: Any = Counting()
    detokenizer = Detokenizer(counting, True)
    for _ in range(2000):
        detokenizer.push(BYTES[-1])
    assert counting.decoded < 60 * 2000
    assert len(detokenizer.text) > 1980


@pytest.mark.parametrize("name", [*SPACED, "byte level"])
def test_a_text_goes_on_where_its_prompt_ended(name: str) -> None:
    """With the space that SentencePiece's decoders take from where a text begins: the indentation of code."""
    words = family(name)
    model = init_model(SHAPE | FAMILIES["llama"] | {"vocab_size": words.vocab_size}, seed=5)
    llm = LLM(model, words, num_blocks=64)
    space = words.encode_text([" "], continues=True)[0][0]
    params = SamplingParams(n=32, temperature=1.0, seed=0, max_tokens=4, ignore_eos=True, logit_bias={space: 4.0})
    outputs = llm.generate("def add(a):", params)[0]
    prompt, texts = list(outputs.prompt_token_ids), [o.text for o in outputs.outputs]
    whole = [words.decode([*prompt, *o.token_ids]) for o in outputs.outputs]
    assert texts == [text.removeprefix(words.decode(prompt)) for text in whole]
    assert any(text.startswith(" ") for text in texts)
    plain = [i for i in range(words.vocab_size) if words.backend.id_to_token(i) not in words.control.names]
    params = dataclasses.replace(params, allowed_token_ids=plain)
    begun = llm.generate({"prompt_token_ids": list(words.prefix_ids)}, params)[0].outputs
    assert [o.text for o in begun] == [words.decode(o.token_ids) for o in begun]
