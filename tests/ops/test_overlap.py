"""Shared n-grams against Python sets of tuples of words."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsft import ops
from fastsft.ops import reference

Rows = list[tuple[int, int, list[tuple[int, int, int, int]]]]


def rows_of(found: ops.overlap.Overlaps) -> Rows:
    shared = np.concatenate([found.ngrams[..., None], found.words[..., None], found.passage], axis=2)
    rows = zip(found.text.tolist(), found.reference.tolist(), shared.tolist(), strict=True)
    return [(t, r, [tuple(s) for s in k]) for t, r, k in rows]


def arena(texts: list[bytes]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    return np.frombuffer(b"".join(texts), np.uint8), np.cumsum([0, *map(len, texts)])


WORDS = ["a", "B", "b", "c", "x_1", "über", "identifier_of_more_than_sixteen_bytes"]
TEXT = st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from([" ", "\n\t", ".", "(", " 你 "])), max_size=25).map(
    lambda parts: "".join(itertools.chain.from_iterable(parts))
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.lists(TEXT, max_size=4), st.lists(TEXT, max_size=4), st.sets(st.integers(1, 7), min_size=1, max_size=3)
)  # fmt: skip
def test_equals_sets(texts: list[str], references: list[str], ngrams: set[int]) -> None:
    index = ops.ngram_index(references, list(ngrams))
    expected = reference.ngram_overlap(texts, reference.ngram_index(references, list(ngrams)))
    assert rows_of(ops.ngram_overlap(texts, index)) == expected
    data = ops.ngram_index(arena([r.encode() for r in references]), list(ngrams))
    assert rows_of(ops.ngram_overlap(arena([t.encode() for t in texts]), data)) == expected
    assert len(index) == len(references)
    assert index.ngrams == sorted(ngrams)
    assert index.num_words.tolist() == [len(reference.text_units(r, "word")) for r in references]


def passages(seed: int, count: int, words: int) -> list[str]:
    """Texts of random words with passages of each other in them."""
    rng = random.Random(seed)
    texts = [[f"w{rng.randrange(300)}" for _ in range(rng.randrange(words))] for _ in range(count)]
    for text in texts:
        other = rng.choice(texts)
        at, begin = rng.randrange(len(text) + 1), rng.randrange(len(other) + 1)
        text[at:at] = other[begin : begin + rng.randrange(30)]
    return [" ".join(t) for t in texts]


@functools.cache
def expected_passages() -> tuple[list[str], list[str], Rows]:
    texts, references = passages(1, 200, 120), passages(1, 30, 60)
    return texts, references, reference.ngram_overlap(texts, reference.ngram_index(references, (3, 8, 13)))


def test_instruction_sets_and_threads(isa: str, threads: Callable[[int], None]) -> None:
    texts, references, expected = expected_passages()
    assert len(expected) > 30
    assert any(shared[2][0] for _, _, shared in expected)
    for count in (1, 2, 4):
        threads(count)
        assert rows_of(ops.ngram_overlap(texts, ops.ngram_index(references, (13, 3, 8)))) == expected


def colliding_words() -> tuple[bytes, bytes]:
    """Two words of 16 bytes with the same 64-bit hash: one step of it can be undone by the word's second half."""
    low, factor = 2**64 - 1, 0xBF58476D1CE4E5B9
    rng = random.Random(0)
    allowed = b"abcdefghijklmnopqrstuvwxyz0123456789_" + bytes(range(0x80, 0x100))

    def first_step(half: bytes) -> int:
        s = ((0x9E3779B97F4A7C15 * 16 & low) ^ int.from_bytes(half, "little")) * factor & low
        return s ^ s >> 32

    while True:
        one, two, rest = (bytes(rng.choices(allowed, k=8)) for _ in range(3))
        other = (first_step(one) ^ first_step(two) ^ int.from_bytes(rest, "little")).to_bytes(8, "little")
        if set(other) <= set(allowed):
            return one + rest, two + other


def test_equal_hashes_of_different_words_are_no_hit() -> None:
    one, two = colliding_words()
    assert one != two
    assert reference.minhash.word_state(one) == reference.minhash.word_state(two)
    texts = [b"some words before " + word + b" and some behind it" for word in (one, two)]
    for ngrams in ([3], [1, 2, 3], [8]):
        for known in (texts[:1], texts[1:], texts):
            found = ops.ngram_overlap(arena(texts), ops.ngram_index(arena(known), ngrams))
            whole = [(t, r) for t, r, n in zip(found.text, found.reference, found.words[:, -1], strict=True) if n == 8]
            assert whole == [(t, r) for t, text in enumerate(texts) for r, k in enumerate(known) if k == text]
    assert len(ops.ngram_overlap(arena(texts), ops.ngram_index(arena([one]), [1]))) == 1


def test_passages_are_bytes_of_the_reference() -> None:
    given = "def Add(a, b):\n    '''Summe über a und b.'''\n    return a + b"
    found = ops.ngram_overlap(["x DEF add A b summe über A z"], ops.ngram_index([given], [3]))
    assert found.ngrams.tolist() == [[5]]
    assert found.words.tolist() == [[7]]
    begin, end = found.passage[0, 0]
    assert given.encode()[begin:end].decode() == "def Add(a, b):\n    '''Summe über a"


def test_a_word_repeated_for_long() -> None:
    """What one text costs is limited by its length and the index, not by their product."""
    index = ops.ngram_index(["0, " * 20_000] * 10, (8, 13))
    found = ops.ngram_overlap(["0 " * 200_000], index)
    assert found.words.tolist() == [[20_000, 20_000]] * 10
    assert found.ngrams.tolist() == [[19_993, 19_988]] * 10


@settings(max_examples=200, deadline=None)
@given(
    st.lists(TEXT, max_size=6),
    st.lists(TEXT, max_size=6),
    st.lists(st.sampled_from([0, 0.25, 0.5, 0.9]), min_size=2, max_size=2),
)
def test_the_best_pair_of_each_text(texts: list[str], references: list[str], above: list[float]) -> None:
    index = ops.ngram_index(references, (2, 3))
    every = ops.ngram_overlap(texts, index)
    shares = every.words / index.num_words[every.reference][:, None]
    passing = np.where(shares > above, shares, -1).max(axis=1)
    best: dict[int, int] = {}
    for pair in np.flatnonzero(passing >= 0).tolist():
        text = int(every.text[pair])
        if text not in best or passing[pair] > passing[best[text]]:
            best[text] = pair
    found = ops.ngram_overlap(texts, index, above=above)
    assert rows_of(found) == [rows_of(every)[pair] for pair in best.values()]
    assert np.flatnonzero(found.found).tolist() == sorted(set(every.reference[passing >= 0].tolist()))
    assert np.flatnonzero(every.found).tolist() == sorted(set(every.reference.tolist()))


def test_a_header_that_all_have() -> None:
    """Millions of pairs, of which no more than the texts are kept."""
    texts = [f"the one header of all the files that are here x{i} y{i}" for i in range(1500)]
    found = ops.ngram_overlap(texts, ops.ngram_index(texts, [8]), above=[0.0])
    assert found.text.tolist() == found.reference.tolist() == list(range(1500))
    assert found.found.all()


def test_nothing_to_compare() -> None:
    for texts, references in (([], ["a b c"]), (["a b c"], []), (["a b"], ["a b c"]), (["", "?!"], ["", "..."])):
        found = ops.ngram_overlap(texts, ops.ngram_index(references, [3]))
        assert (len(found), found.ngrams.shape, found.passage.shape) == (0, (0, 1), (0, 1, 2))


def test_wrong_arguments() -> None:
    for ngrams in ([], [0], [5, 5], [-1, 3]):
        with pytest.raises(ValueError, match="ngram_index: ngrams: expected"):
            ops.ngram_index(["a"], ngrams)
    index = ops.ngram_index(["a"])
    with pytest.raises(ValueError, match=r"ngram_index: texts\[1\]: expected str"):
        ops.ngram_index(["a", 1])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"ngram_overlap: .*lone surrogate"):
        ops.ngram_overlap(["\ud800"], index)
    with pytest.raises(ValueError, match="ngram_overlap: texts: expected a sequence of str"):
        ops.ngram_overlap("text", index)
    with pytest.raises(ValueError, match="ngram_overlap: above: expected a share for each of 3 lengths, got 1"):
        ops.ngram_overlap(["a"], index, above=[0.5])
