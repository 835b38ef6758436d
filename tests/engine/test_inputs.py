"""A step as tensors: what they hold, and that a long context costs hardly more than a short one."""

from __future__ import annotations

import statistics
import time
from array import array
from typing import Any

import torch
from fake_model import FakeTokenizer

from fastsft.engine.detokenize import Detokenizer
from fastsft.engine.request import SamplingParams
from fastsft.engine.runner import Inputs
from fastsft.engine.sequence import Sequence
from fastsft.engine.tree import Fork


def sequence_of(blocks: int, tokens: int, computed: int) -> Sequence:
    tokenizer: Any = FakeTokenizer()
    sequence = Sequence("0", 0, [*range(tokens)], tokens, 1 << 20, SamplingParams(), Detokenizer(tokenizer, True), 0)
    sequence.blocks.extend(range(7, 7 + blocks))
    sequence.computed = computed
    return sequence


def test_what_they_hold() -> None:
    drafting = sequence_of(3, 40, 39)
    drafting.draft = [5, 6]
    inputs = Inputs.build([(drafting, 3), (sequence_of(1, 9, 0), 9)])
    assert inputs.ids_T.tolist() == [39, 5, 6, *range(9)]
    assert inputs.cu_seqlens.tolist() == [0, 3, 12]
    assert inputs.context_lens_B.tolist() == [42, 9]
    assert inputs.block_table.tolist() == [[7, 8, 9], [7, 0, 0]]
    assert inputs.block_table.dtype == torch.int32
    assert not inputs.adapters


def test_forks_are_sequences_of_their_own() -> None:
    forked = sequence_of(3, 40, 39)
    forked.draft = [5, 6]
    forked.forks = [Fork([4], array("i", [7, 8, 21]), 2), Fork([5, 3, 2], array("i", [7, 8, 22, 23]), 2)]
    inputs = Inputs.build([(sequence_of(1, 9, 0), 9), (forked, 9), (sequence_of(2, 20, 19), 1)])
    assert inputs.ids_T.tolist() == [*range(9), 39, 5, 6, 39, 4, 39, 5, 3, 2, 19]
    assert inputs.cu_seqlens.tolist() == [0, 9, 12, 14, 18, 19]
    assert inputs.context_lens_B.tolist() == [9, 42, 41, 43, 20]
    assert inputs.block_table.tolist() == [[7, 0, 0, 0], [7, 8, 9, 0], [7, 8, 21, 0], [7, 8, 22, 23], [7, 8, 0, 0]]


def test_a_long_context_costs_hardly_more() -> None:
    def seconds(blocks: int) -> float:
        work = [(sequence_of(blocks, 20, 19), 1) for _ in range(32)]
        found = []
        for _ in range(9):
            begin = time.perf_counter()
            Inputs.build(work)
            found.append(time.perf_counter() - begin)
        return statistics.median(found)

    assert seconds(4000) < 8 * seconds(4)  # a list of numbers: 200 times
