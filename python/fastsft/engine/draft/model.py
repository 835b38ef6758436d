"""Drafts from a smaller model of the same tokenizer, drawn with the noise of the tokens that they guess.

Where the two models' distributions agree, so do their draws: the guess of a sampled token holds far more often than a
draw of its own would, and of a greedy one as often as the most probable tokens are the same. For rejection sampling
they are drawn with other noise, and what they were drawn from comes with them.
"""

from __future__ import annotations

import os

import torch

from fastsft.engine.blocks import BlockAllocator, OutOfBlocks
from fastsft.engine.draft.guess import Guess
from fastsft.engine.draft.noise import draw_alike, draw_others
from fastsft.engine.place import make_runner
from fastsft.engine.rejection import guess
from fastsft.engine.runner import Inputs
from fastsft.engine.sequence import Sequence
from fastsft.models.tokenizer import Tokenizer


class DraftModel:
    """The model, in bfloat16, and a cache of its own for all texts.

    Args:
        folder: a Hugging Face folder.
        tokenizer: of the model that the drafts are for.
        vocab_size: that model's.
        rejection: sampled drafts are for rejection sampling.
        device: where it computes.

    Raises:
        ValueError: another tokenizer; the message names the first token that differs. Or a cache without a block.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        tokenizer: Tokenizer,
        vocab_size: int,
        *,
        kv_cache_bytes: int,
        rejection: bool = False,
        device: torch.device,
    ) -> None:
        check_same_tokens(tokenizer, Tokenizer.from_folder(folder))
        self.runner = make_runner(
            folder, device=device, format="bfloat16", kv_cache_bytes=kv_cache_bytes, what="speculative_config"
        )
        self.block_size = self.runner.block_size
        self.allocator = BlockAllocator(self.runner.num_blocks)
        self.vocab_size = min(vocab_size, self.runner.vocab_size)
        if self.runner.vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"speculative_config: model: expected at least {tokenizer.vocab_size} tokens, the tokenizer's, got "
                f"{self.runner.vocab_size}"
            )
        self.rejection, self.target_vocab_size = rejection, vocab_size


def check_same_tokens(ours: Tokenizer, theirs: Tokenizer) -> None:
    """Raises ValueError where an id is not the same token in both."""
    a, b = ({i: t for t, i in x.backend.get_vocab(with_added_tokens=True).items()} for x in (ours, theirs))
    for i in sorted(a.keys() | b.keys()):
        if a.get(i) != b.get(i):
            raise ValueError(
                f"speculative_config: model: expected the same tokenizer, but token {i} is {a.get(i)!r} here and "
                f"{b.get(i)!r} in the draft model's"
            )


class ModelGuess(Guess):
    """Of one text. What it holds in the cache follows the text: drafts that did not hold are written over.

    Args:
        branches: places of a proposal for which another guess may be asked.
    """

    def __init__(self, draft: DraftModel, sequence: Sequence, branches: int = 0) -> None:
        self._draft, self._sequence, self._branches = draft, sequence, branches
        self._blocks: list[int] = []
        self._known: list[int] = []  # tokens whose keys and values the cache has
        self._agreed = 0  # how many of them were the text's at the last call
        self._drawn: list[int] = []  # the latest proposal
        self._logits: list[torch.Tensor] = []  # [1, V] that its first ones were drawn from, for other guesses
        self._probs_KV: list[torch.Tensor] = []  # what all of it was drawn from, for rejection sampling

    def propose(self, tokens: list[int], limit: int) -> list[int]:
        """At most ``limit`` tokens; fewer where the cache or the model's context is full."""
        agreed = self._agreed
        while agreed < min(len(self._known), len(tokens) - 1) and self._known[agreed] == tokens[agreed]:
            agreed += 1
        del self._known[agreed:]
        self._agreed, new, found = agreed, tokens[agreed:], list[int]()
        self._probs_KV, self._logits, self._drawn = [], [], found
        while len(found) < limit and self._has_room(len(self._known) + len(new)):
            if max(new) >= self._draft.runner.vocab_size:  # one of the ids that only pad the other model's vocabulary
                break
            found.append(self._next(new, len(found)))
            new = found[-1:]
        self._sequence.draft_probs_KV = torch.stack(self._probs_KV) if self._probs_KV else None
        return found

    def _has_room(self, count: int) -> bool:
        draft = self._draft
        if count > draft.runner.max_position_embeddings:
            return False
        try:
            self._blocks += draft.allocator.allocate(max(0, -(-count // draft.block_size) - len(self._blocks)))
        except OutOfBlocks:
            return False
        return True

    def _next(self, new: list[int], place: int) -> int:
        """Compute ``new`` and draw what follows."""
        self._known += new
        inputs = Inputs(
            torch.tensor(new, dtype=torch.int64),
            torch.tensor([0, len(new)], dtype=torch.int32),
            torch.tensor([len(self._known)], dtype=torch.int32),
            torch.tensor([self._blocks], dtype=torch.int32),
        )
        logits_1V = self._draft.runner.forward(inputs, torch.tensor([len(new) - 1]))[:, : self._draft.vocab_size]
        sequence, params = self._sequence, self._sequence.params
        if self._draft.rejection and params.temperature > 0:
            token, q_V = guess(logits_1V.cpu(), params, sequence.seed, sequence.generated + place)
            padding = self._draft.target_vocab_size - self._draft.vocab_size
            self._probs_KV.append(torch.nn.functional.pad(q_V, (0, padding)))
            return token
        if place < self._branches:
            self._logits.append(logits_1V.clone())
        return draw_alike(sequence, logits_1V.contiguous(), place)[0]

    def others(self, count: int) -> list[int]:
        logits, self._logits = self._logits[:count], []
        return draw_others(self._sequence, torch.cat(logits), self._drawn[:count]) if logits else []

    def close(self) -> None:
        """Give the blocks back."""
        self._draft.allocator.release(self._blocks)
        self._blocks, self._known, self._agreed = [], [], 0
