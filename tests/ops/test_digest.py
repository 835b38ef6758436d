"""Digests against the same formula in Python integers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsft import ops
from fastsft.ops import reference


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=70), max_size=6))
def test_equals_reference(texts: list[str]) -> None:
    found = ops.text_digests(texts)
    assert found.dtype == np.uint64
    assert found.tolist() == reference.text_digests(texts)
    data = [t.encode() for t in texts]
    offsets = np.cumsum([0, *map(len, data)])
    arena = np.frombuffer(b"".join(data), np.uint8)
    assert np.array_equal(ops.text_digests((arena, offsets)), found)


def test_threads_and_collisions(threads: Callable[[int], None]) -> None:
    texts = [f"{i}" * (1 + i % 40) for i in range(20_000)]
    threads(1)
    one = ops.text_digests(texts)
    threads(4)
    assert np.array_equal(ops.text_digests(texts), one)
    for half in range(2):
        assert len(np.unique(one[:, half])) == len(set(texts))
        bits = np.unpackbits(one[:, half].copy().view(np.uint8)).reshape(-1, 64).mean(axis=0)
        assert np.all(np.abs(bits - 0.5) < 0.03)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"texts\[1\]: expected str"):
        ops.text_digests(["a", 1])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="lone surrogate"):
        ops.text_digests(["\ud800"])
