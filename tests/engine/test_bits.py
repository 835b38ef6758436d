"""Differing bits: none. A request's tokens and log-probabilities are those that it has alone in an empty engine."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import assert_nothing_held, engine, prompts_of, write_model

from fastsft.engine.assemble import Assembly
from fastsft.engine.request import CompletionOutput, Request, SamplingParams
from fastsft.engine.sequence import Sequence

FORMATS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "w8a8": {"quantization": "w8a8", "kv_cache_dtype": "int8"},
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "wide": {},
    "chunks": {"max_batched_tokens": 13, "max_num_seqs": 5},
    "preemption": {"num_blocks": 9, "max_batched_tokens": 40},
    "drafts": {"max_batched_tokens": 50},
}


class RandomDrafts:
    """What follows in truth, or what stood before somewhere in the text, on up to three paths.

    Args:
        truth: the continuations of each request.
    """

    def __init__(self, truth: dict[str, tuple[CompletionOutput, ...]]) -> None:
        self._truth, self._random = truth, random.Random(3)
        self.forked = 0

    def begin(self, sequences: int) -> bool:
        return True

    def propose(self, sequence: Sequence, limit: int) -> list[list[int]]:
        return [self._path(sequence, limit) for _ in range(self._random.randint(0, 3))]

    def _path(self, sequence: Sequence, limit: int) -> list[int]:
        at, text = self._random.randrange(len(sequence.tokens)), sequence.tokens
        if self._random.random() < 0.3:
            at, text = sequence.generated, list(self._truth[sequence.request_id][sequence.index].token_ids)
        return text[at : at + min(limit, self._random.randint(0, 5))]

    def observe(self, sequence: Sequence, paths: list[list[int]], best: int, accepted: int) -> None:
        self.forked += best > 0

    def forget(self, sequence: Sequence) -> None:
        pass

    def measured(self, rows: int, seconds: float) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "qwen3", "qwen3")


def requests() -> list[Request]:
    """Prompts that share beginnings of several lengths, at block boundaries and beside them."""
    source = random.Random(4)
    trunk, other = prompts_of([64, 40], seed=1)
    found = []
    for i in range(24):
        begin = source.choice([trunk, other])[: source.choice([3, 16, 17, 31, 32, 40, 64])]
        (end,) = prompts_of([source.choice([1, 2, 15, 16, 30])], seed=100 + i)
        params = SamplingParams(
            temperature=source.choice([0.0, 1.0]), seed=i, n=source.choice([1, 1, 3]), logprobs=3,
            max_tokens=source.randint(1, 24), ignore_eos=True, presence_penalty=source.choice([0.0, 0.5]),
        )  # fmt: skip
        found.append(Request(f"{i}", (*begin, *end), params, source.choice([0, 0, 1])))
    return found


@pytest.mark.parametrize("weights", FORMATS)
def test_a_request_has_the_bits_that_it_has_alone(weights: str, folder: Path) -> None:
    asked = requests()
    alone = {}
    for one in asked:
        llm = engine(folder, **FORMATS[weights])
        alone[one.request_id] = llm.generate({"prompt_token_ids": one.prompt_token_ids}, one.params)[0].outputs
    for name, schedule in SCHEDULES.items():
        llm = engine(folder, **FORMATS[weights], **schedule)
        if name == "drafts":
            llm.core._drafter = drafter = RandomDrafts(alone)
        together = {one.request_id: Assembly(one) for one in asked}
        arrivals = random.Random(7)
        left = list(asked)
        while left or llm.core.busy:
            for _ in range(arrivals.choice([0, 0, 1, 5])):
                if left:
                    llm.core.add(left.pop(0))
            for update in llm.core.step():
                together[update.request_id].take(update)
        for request_id, expected in alone.items():
            assert together[request_id].output().outputs == expected, (name, request_id)
        stats = llm.core.stats()
        assert stats.found_tokens > 400, name
        assert (stats.preemptions > 0) == (name in ("preemption", "chunks")), name
        assert (stats.accepted_tokens > 0) == (name == "drafts")
        assert name != "drafts" or drafter.forked > 20
        assert_nothing_held(llm)
