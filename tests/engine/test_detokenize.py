"""Tokens pushed one by one give the text that all of them give, and a push costs the same however many came before."""

from __future__ import annotations

from typing import Any

from engine_cases import VOCAB, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsft.engine.detokenize import Detokenizer

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


def test_what_is_never_complete_is_shown_and_costs_no_more_in_the_end() -> None:
    counting: Any = Counting()
    detokenizer = Detokenizer(counting, True)
    for _ in range(2000):
        detokenizer.push(BYTES[-1])
    assert counting.decoded < 60 * 2000
    assert len(detokenizer.text) > 1980
