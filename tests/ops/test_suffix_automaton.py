"""The suffix automaton against a search through the text."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsft.ops.suffix_automaton import SEPARATOR, SuffixAutomaton


def longest_repeated(text: list[int]) -> int:
    """Length of the longest proper end of the text that also occurs earlier (they may overlap)."""
    n = len(text)
    return max((k for k in range(1, n) if any(text[i : i + k] == text[n - k :] for i in range(n - k))), default=0)


def longest_end_in(text: list[int], other: list[int]) -> int:
    held = range(len(other) + 1)
    return max(k for k in held if k == 0 or any(text[i : i + k] == other[-k:] for i in range(len(text) - k + 1)))


def continuations(text: list[int], end: list[int], limit: int) -> list[list[int]]:
    """What may follow ``end`` at each earlier place, going on periodically where the place overlaps the text's end."""
    found = []
    for i in range(len(text) - len(end)):
        if text[i : i + len(end)] == end:
            ahead = list(text)
            for j in range(limit):
                ahead.append(ahead[i + len(end) + j])
            found.append(ahead[len(text) :])
    return found


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=40))
def test_every_append_against_a_search(text: list[int]) -> None:
    automaton = SuffixAutomaton()
    for n in range(1, len(text) + 1):
        automaton.extend(text[n - 1 : n])
        length = longest_repeated(text[:n])
        assert automaton.repeated == length
        guess = automaton.propose(6)
        if length == 0:
            assert guess == []
        else:
            assert guess in continuations(text[:n], text[n - length : n], 6)
    assert len(automaton) == len(text)
    assert automaton.states <= max(2 * len(text), 1)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=30), st.lists(st.integers(0, 3), max_size=20))
def test_a_cursor_against_a_search(text: list[int], other: list[int]) -> None:
    cursor = SuffixAutomaton(text).cursor()
    for n in range(1, len(other) + 1):
        cursor.follow(other[n - 1 : n])
        length = longest_end_in(text, other[:n])
        assert cursor.matched == length
        guess = cursor.propose(3)
        places = [i for i in range(len(text) - length + 1) if text[i : i + length] == other[n - length : n]]
        ahead = [text[i + length : i + length + 3] for i in places]
        assert (guess == [] and length == 0) or any(guess[: len(a)] == a for a in ahead)


def test_the_latest_known_place_is_taken() -> None:
    assert SuffixAutomaton([1, 2, 3, 9, 1, 2, 4, 8, 1, 2]).propose(2) == [4, 8]
    assert SuffixAutomaton([5, 6, 5, 6]).propose(5) == [5, 6, 5, 6, 5]  # goes on periodically
    assert SuffixAutomaton([1, 2, 3]).propose(4) == []
    assert SuffixAutomaton([1, 1]).propose(0) == []


def test_no_guess_goes_past_a_separator() -> None:
    corpus = SuffixAutomaton([1, 2, 3, SEPARATOR, 1, 5, SEPARATOR])
    cursor = corpus.cursor()
    cursor.follow([2])
    assert cursor.propose(4) == [3]
    cursor.follow([3])
    assert cursor.propose(4) == []


def test_size_and_memory_of_a_long_text() -> None:
    rng = random.Random(0)
    phrases = [[rng.randrange(2000) for _ in range(rng.randrange(2, 12))] for _ in range(300)]
    text = np.array([t for _ in range(6000) for t in rng.choice(phrases)], dtype=np.int32)
    automaton = SuffixAutomaton(text)
    assert len(automaton) == len(text)
    assert len(text) <= automaton.states <= 2 * len(text)
    assert automaton.bytes <= 220 * len(text) + 4096


@pytest.mark.parametrize("tokens", [np.zeros((2, 2), dtype=np.int32)])
def test_wrong_arguments(tokens: np.ndarray) -> None:
    with pytest.raises(ValueError, match="tokens"):
        SuffixAutomaton(tokens)
