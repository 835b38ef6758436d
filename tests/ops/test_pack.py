"""Packing: against the plain best-fit-decreasing reference, and the properties that every packing must have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsft import ops
from fastsft.ops import reference


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 60).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(0, c), max_size=80))))
def test_equals_reference(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    packs = ops.pack_sequences(lengths, capacity=capacity)
    assert [bin.tolist() for bin in packs] == reference.pack_sequences(lengths, capacity=capacity)


@pytest.mark.parametrize("capacity", [512, 4096, 5000, 100_000, 2**40])
def test_equals_reference_across_radix_digits(capacity: int) -> None:
    lengths = np.random.default_rng(capacity).integers(0, capacity, 300, endpoint=True)
    packs = ops.pack_sequences(lengths, capacity=capacity)
    assert [bin.tolist() for bin in packs] == reference.pack_sequences(lengths.tolist(), capacity=capacity)


def test_every_sequence_once_and_bins_full() -> None:
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(6, 1, 20_000).astype(np.int64) + 1, 8192)
    packs = ops.pack_sequences(lengths, capacity=8192)
    assert packs.order.dtype == packs.offsets.dtype == np.int64
    assert sorted(packs.order.tolist()) == list(range(len(lengths)))
    used = np.add.reduceat(lengths[packs.order], packs.offsets[:-1])
    assert used.max() <= 8192
    assert len(packs) <= 1.01 * lengths.sum() / 8192 + 1


def test_inputs() -> None:
    expected = ops.pack_sequences([3, 7, 5], capacity=10)
    for lengths in (
        torch.tensor([3, 7, 5]),
        np.array([3, 7, 5], np.int32),
        np.array([3, 0, 7, 0, 5], np.uint16)[::2],
    ):
        packs = ops.pack_sequences(lengths, capacity=10)
        assert packs.order.tolist() == expected.order.tolist()
        assert packs.offsets.tolist() == expected.offsets.tolist()
    empty = ops.pack_sequences([], capacity=1)
    assert len(empty) == 0
    assert empty.offsets.tolist() == [0]
    assert [b.tolist() for b in ops.pack_sequences([0, 0], capacity=1)] == [[0, 1]]
    with pytest.raises(IndexError):
        expected[2]


@pytest.mark.parametrize(
    ("lengths", "capacity", "message"),
    [
        ([1, 11], 10, r"lengths\[1\]: expected 0 <= length <= capacity = 10, got 11"),
        ([1, 2, -1], 10, r"lengths\[2\].*got -1"),
        ([1], 0, "capacity: expected >= 1, got 0"),
        ([1.5], 10, r"lengths: expected \[N\] integers, got float64\[1\]"),
        ([[1]], 10, r"got int64\[1, 1\]"),
    ],
)
def test_errors(lengths: list[int], capacity: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.pack_sequences(lengths, capacity=capacity)
