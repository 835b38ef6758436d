"""Characters of texts, which are read 64 bytes at a time, against the reference: at every place in and between them."""

from __future__ import annotations

import random

import numpy as np
import pytest

from fastsft import _C, ops
from fastsft.ops import reference


def texts() -> list[str]:
    rng = random.Random(0)
    made = [" " * 64, "x" * 64, " " * 63 + "x", "x" + " " * 64, "x" * 63 + "é" + " " * 64 + "é"]
    for alphabet, longest in (("aZ_[@`{9", 200), ("aB \n\t", 300), ("  \v\fxY", 200), ("ab  é日😀", 300)):
        made += ["".join(rng.choices(alphabet, k=rng.randrange(longest))) for _ in range(60)]
    for at in range(60, 69):  # what stands at the border of two blocks
        made += [f"{'a ' * 40}"[:at] + middle + "b" * 70 for middle in (" ", "  ", " \n ", "é", "😀", " é ", "\u0085")]
    return made


@pytest.mark.parametrize("ngram", [1, 5])
def test_equal_reference(ngram: int) -> None:
    expected = reference.minhash_signatures(texts(), num_perm=4, ngram=ngram, unit="char")
    pairs = [pair for i, text in enumerate(texts()) for pair in (text, f" {text}\n")]
    for isa in _C.available_isas():
        _C.set_isa(isa)
        assert np.array_equal(ops.minhash_signatures(texts(), num_perm=4, ngram=ngram, unit="char"), expected)
        labels = ops.near_duplicates(pairs, ngram=ngram, unit="char", threshold=1.0)  # hashes of 64 bits
        assert np.array_equal(labels, reference.near_duplicates(pairs, ngram=ngram, unit="char", threshold=1.0))


def test_bytes_that_are_not_utf8() -> None:
    """The same characters on every instruction set, whatever the bytes."""
    data = np.random.default_rng(0).choice(np.array([32, 97, 128, 191, 195, 240, 10], np.uint8), 40_000)
    offsets = np.arange(0, 40_001, 100)
    found = set()
    for isa in _C.available_isas():
        _C.set_isa(isa)
        found.add(ops.minhash_signatures((data, offsets), num_perm=4, unit="char").tobytes())
    assert len(found) == 1
