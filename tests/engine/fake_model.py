"""A model for tests of the core: its logits are a function of every token of the context, as read from the cache."""

from __future__ import annotations

import random
from typing import Any

import torch

from fastsft import ops
from fastsft.engine.runner import Inputs
from fastsft.engine.sequence import Sequence

VOCAB = 7


class Interrupted(Exception):
    pass


def logits_after(version: int, tokens: list[int]) -> list[float]:
    source = random.Random(repr((version, tokens)))
    return [source.gauss(0, 2) for _ in range(VOCAB)]


def next_token(version: int, tokens: list[int], temperature: float, seed: int, place: int) -> int:
    """Of a sequence alone, with nothing but the model: what any engine has to generate."""
    logits = torch.tensor([logits_after(version, tokens)])
    ids, _ = ops.sample(
        logits, temperature=torch.tensor([temperature]), top_k=torch.tensor([0], dtype=torch.int32),
        top_p=torch.ones(1), min_p=torch.zeros(1), seeds=torch.tensor([seed]), positions=torch.tensor([place]),
    )  # fmt: skip
    return int(ids[0])


class FakeRunner:
    """The cache holds (weights' version, position, token) in place of keys and values."""

    vocab_size = VOCAB
    bytes_per_block = 1000
    graph_steps = 0
    warm_up_seconds = 0.0

    def __init__(self, *, block_size: int, num_blocks: int, max_position_embeddings: int = 64) -> None:
        self.block_size, self.num_blocks = block_size, num_blocks
        self.max_position_embeddings = max_position_embeddings
        self.slots: list[Any] = [None] * (num_blocks * block_size)
        self.version = 0
        self.fail_next = False
        self.computed = 0

    def forward(self, inputs: Inputs, rows_R: torch.Tensor) -> torch.Tensor:
        bounds, table = inputs.cu_seqlens.tolist(), inputs.block_table.tolist()
        positions = [
            p
            for begin, end, context in zip(bounds, bounds[1:], inputs.context_lens_B.tolist(), strict=False)
            for p in range(context - (end - begin), context)
        ]
        size = self.block_size
        owner = [b for b in range(len(table)) for _ in range(bounds[b + 1] - bounds[b])]
        slots = [table[b][p // size] * size + p % size for b, p in zip(owner, positions, strict=True)]
        assert len(set(slots)) == len(slots), "two tokens in one place"
        half = len(slots) // 2 if self.fail_next else len(slots)
        ids = inputs.ids_T.tolist()
        for slot, position, token in list(zip(slots, positions, ids, strict=True))[:half]:
            self.slots[slot] = (self.version, position, token)
        if self.fail_next:
            self.fail_next = False
            raise Interrupted
        self.computed += len(slots)
        logits = []
        for row in rows_R.tolist():
            b = owner[row]
            context = [self.slots[table[b][p // size] * size + p % size] for p in range(positions[row] + 1)]
            assert [c[:2] for c in context] == [(self.version, p) for p in range(len(context))], "stale or misplaced"
            logits.append(logits_after(self.version, [c[2] for c in context]))
        return torch.tensor(logits).reshape(-1, VOCAB)

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        size = self.block_size
        for source, target in copies:
            self.slots[target * size : (target + 1) * size] = self.slots[source * size : (source + 1) * size]

    def update(self, model: Any) -> None:
        self.version += 1


class FakeTokenizer:
    """One letter per token."""

    prefix_ids = ()

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join("abcdefg"[i] for i in ids)

    decode_inside = decode


class FakeDrafter:
    """Guesses right, wrong, or nothing, at random; what it is told must be what happened."""

    def __init__(self, runner: FakeRunner, seed: int) -> None:
        self._runner, self._random = runner, random.Random(seed)
        self._open: dict[Sequence, tuple[list[int], list[list[int]]]] = {}
        self.forked = 0  # times that another path than the first held the longest

    def begin(self, sequences: int) -> bool:
        return True

    def propose(self, sequence: Sequence, limit: int) -> list[list[int]]:
        assert limit >= 1
        paths = [self._path(sequence) for _ in range(self._random.choice([0, 1, 1, 2, 3]))]
        self._open[sequence] = (list(sequence.tokens), [path[:limit] for path in paths])
        return paths  # longer than the limit at times, and empty at times

    def _path(self, sequence: Sequence) -> list[int]:
        guess: list[int] = []
        right = self._random.randint(0, 3)
        for j in range(self._random.randint(0, 6)):
            token = next_token(
                self._runner.version, sequence.tokens + guess, sequence.params.temperature, sequence.seed,
                sequence.generated + j,
            )  # fmt: skip
            guess.append(token if j < right else (token + self._random.randint(0, 1)) % VOCAB)
        return guess

    def observe(self, sequence: Sequence, paths: list[list[int]], best: int, accepted: int) -> None:
        before, proposed = self._open.pop(sequence)
        assert paths[0] == proposed[0]
        assert all(path in proposed for path in paths), "some may have found no blocks"
        new = sequence.tokens[len(before) :]
        guess = paths[best]
        self.forked += best > 0
        assert guess[:accepted] == new[:accepted]
        longest = [next((j for j, (a, b) in enumerate(zip(p, new, strict=False)) if a != b), len(p)) for p in paths]
        if sequence.finish_reason is None:
            assert best == longest.index(max(longest))
        if sequence.finish_reason is None:
            assert len(new) == accepted + 1
            assert accepted == len(guess) or guess[accepted] != new[accepted]

    def forget(self, sequence: Sequence) -> None:
        self._open.pop(sequence, None)

    def measured(self, rows: int, seconds: float) -> None:
        assert rows > 0
