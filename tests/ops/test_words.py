"""Words of texts outside ASCII: where they begin and end, against the reference and Unicode's own categories."""

from __future__ import annotations

import itertools
import random
import re
import unicodedata

import numpy as np
import pytest

from fastsft import ops
from fastsft.ops import reference
from fastsft.ops.reference.words import words

CHARACTERS = "aZ_9 .é“—\u00a0\u3000日の。กß\u0301\ufe0f😀🧪\U00020000"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("“Hello” — it\u2019s a\u00a0test…", "hello it s a test"),
        ("größe·Überraschung", "größe Überraschung"),
        ("我们用Python3写\uff0c代码。", "我 们 用 python3 写 代 码"),
        ("カタカナ・ひらがな", "カ タ カ ナ ひ ら が な"),
        ("한국어 문장", "한국어 문장"),
        ("สวัสดี", "ส ว ั ส ด ี"),
        ("नमस्ते।", "नमस्ते"),
        ("done✅🎉ok ❤️!", "done ok"),
        ("x\u00d7y÷z ≤ 2€", "x y z 2"),
    ],
)
def test_examples(text: str, expected: str) -> None:
    assert words(text.encode()) == expected.encode().split()
    separated = ops.minhash_signatures([text, expected], num_perm=64, ngram=2)
    assert np.array_equal(separated[0], separated[1])


def test_quotes_do_not_hide_a_passage() -> None:
    """A typographic quotation of an evaluation instance, and one in Chinese."""
    instance = "hello a b c d e f g"
    chinese = "请写一个函数返回两个数的和"
    index = ops.ngram_index([instance, chinese], [8])
    found = ops.ngram_overlap(["“Hello”—a\u00a0b c d e f g", f"题目\uff1a{chinese[:9]}。"], index)
    assert found.text.tolist() == [0, 1]
    assert found.reference.tolist() == [0, 1]


def test_separators_are_those_of_unicode() -> None:
    """Every space, dash, bracket and quote of the basic plane separates words, and no letter, mark or digit does."""
    for code in itertools.chain(range(0x80, 0xD800), range(0xE000, 0x20000)):
        category = unicodedata.category(chr(code))
        separates = words(chr(code).encode()) == []
        if category in ("Zs", "Zl", "Zp", "Pd", "Ps", "Pe", "Pi", "Pf") and code < 0x10000:
            assert separates, hex(code)
        if separates and not 0xFE00 <= code <= 0xFE0F:  # the selectors behind emoji
            assert category[0] != "L", hex(code)
            assert category not in ("Mn", "Mc", "Nd"), hex(code)


def test_bits_equal_reference_at_every_place(isa: str) -> None:
    """Characters that reach from one block of 64 bytes into the next."""
    rng = random.Random(0)
    texts = ["a" * before + character + after for before in range(60, 66) for character in CHARACTERS
             for after in ("", "b", " b", "日", "—")]  # fmt: skip
    texts += ["".join(rng.choices(CHARACTERS, k=rng.randrange(200))) for _ in range(400)]
    for ngram in (1, 3):
        got = ops.minhash_signatures(texts, num_perm=3, ngram=ngram)
        assert np.array_equal(got, reference.minhash_signatures(texts, num_perm=3, ngram=ngram))


def test_bytes_that_are_no_utf8(isa: str) -> None:
    """Halves of characters, overlong forms and surrogates are parts of words, as in Python's decoder."""
    rng = random.Random(1)
    pieces = [
        *(b"a", b" ", b"b" * 59, "日—".encode(), b"\xc2\xa0", b"\xe2", b"\x80", b"\x94", b"\xff", b"\xf0\x9f\x98"),
        *(b"\xc0\xa0", b"\xe0\x82\xa0", b"\xf0\x82\x80\x94", b"\xed\xa0\x80", b"\xf4\x90\x80\x80"),
    ]
    texts = [b"".join(rng.choices(pieces, k=rng.randrange(1, 30))) for _ in range(400)]
    offsets = np.cumsum([0, *map(len, texts)])
    index = ops.ngram_index((np.frombuffer(b"".join(texts), np.uint8), offsets), [1])
    assert index.num_words.tolist() == [len(words(text)) for text in texts]
    assert max(index.num_words) > 10


def test_ascii_is_as_ever() -> None:
    text = bytes(range(128)).decode() * 3
    assert words(text.encode()) == re.findall(rb"[a-z0-9_]+", text.encode().lower())
