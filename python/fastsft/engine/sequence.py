"""The state of one continuation."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

import torch

from fastsft.engine.detokenize import Detokenizer
from fastsft.engine.processors import Processors
from fastsft.engine.request import SamplingParams, Update
from fastsft.engine.tree import Fork


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter under its name. ``number`` is its own: keys and values in the cache are of the adapter that made them,
    and not of the next one of its name.
    """

    name: str
    number: int
    weights: Any  # what the runner made of it


@dataclass(frozen=True)
class _Told:
    """The last update, and how many tokens and characters all of them brought."""

    update: Update | None = None
    tokens: int = 0
    characters: int = 0


def no_blocks() -> array[int]:
    return array("i")


@dataclass(eq=False)
class Sequence:
    """One continuation in progress.

    ``computed`` tokens have their keys and values in the cache, in ``blocks``; the first ``published`` of these are
    full and can be found by others, under ``keys`` that begin with ``root``. ``draft`` holds guesses at what follows
    ``tokens`` while a step computes them too, ``forks`` other guesses.
    """

    request_id: str
    index: int
    tokens: list[int]
    prompt_len: int
    limit: int  # tokens it may reach, prompt included
    params: SamplingParams
    detokenizer: Detokenizer
    seed: int
    priority: int = 0
    arrival: int = 0
    adapter: Adapter | None = None
    blocks: array[int] = field(default_factory=no_blocks)  # int32: a step copies it as it is
    computed: int = 0
    draft: list[int] = field(default_factory=list)
    forks: list[Fork] = field(default_factory=list)
    hidden_D: torch.Tensor | None = None  # that its last token was drawn from, where drafts need it
    draft_probs_KV: torch.Tensor | None = None  # what each was drawn from, where rejection sampling judges them
    published: int = 0
    keys: list[bytes] = field(default_factory=list)
    root: bytes = b""
    drafted: int = 0  # in all its steps, and how many of them were right
    accepted: int = 0
    siblings: list[Sequence] = field(default_factory=list)  # share the prompt once it is computed
    logprobs: list[dict[int, float]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, float] | None] = field(default_factory=lambda: [None])  # of the first token: none
    processors: Processors | None = None  # what the request changes in its logits
    cumulative_logprob: float = 0.0  # of the generated tokens, under the unmodified distribution
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    _told: _Told = _Told()

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def scoring(self) -> bool:
        """Whether log-probabilities of the prompt are wanted and not there yet. The first continuation has them."""
        wanted = self.params.prompt_logprobs is not None and self.index == 0
        return wanted and len(self.prompt_logprobs) < self.prompt_len

    @property
    def paths(self) -> list[list[int]]:
        """All guesses at what follows, an empty one where there is none."""
        return [self.draft, *[fork.draft for fork in self.forks]]

    def upcoming(self, count: int) -> list[int]:
        """The next ``count`` tokens to compute, drafts included."""
        tokens = self.tokens[self.computed : self.computed + count]
        return tokens + self.draft[: count - len(tokens)]

    def append(self, token: int, end_ids: tuple[int, ...]) -> None:
        """Take the next token and decide whether the sequence ends with it."""
        params = self.params
        self.tokens.append(token)
        may_stop = self.generated >= params.min_tokens
        ends = may_stop and (token in params.stop_token_ids or (token in end_ids and not params.ignore_eos))
        full = len(self.tokens) >= self.limit
        searched = len(self.detokenizer.text)
        if not ends:
            self.detokenizer.push(token)
        if ends or full:
            self.detokenizer.flush()  # before the search: what is held back may complete a stop string
        if may_stop and (stop := self._cut_at_stop(searched)):
            self.finish_reason, self.stop_reason = "stop", stop
        elif ends:
            self.finish_reason, self.stop_reason = "stop", token
        elif full:
            self.finish_reason = "length"

    def _cut_at_stop(self, searched: int) -> str | None:
        """Cut the text where a stop string was completed after ``searched`` characters.

        Of several, the one completed first wins and, of those, the longest: as if the text had come character by
        character, so that the result does not depend on how the tokenizer splits it.
        """
        text, found = self.detokenizer.text, []
        for stop in self.params.stop:
            at = text.find(stop, max(0, searched - len(stop) + 1))
            if at >= 0:
                found.append((at + len(stop), at, stop))
        if not found:
            return None
        _, at, stop = min(found)
        self.detokenizer.text = text[:at]
        return stop

    def update(self, weight_version: int) -> Update:
        """What came since the one that was :meth:`told` last."""
        tokens, characters = self._told.tokens, self._told.characters
        return Update(
            self.request_id,
            self.index,
            tuple(self.tokens[self.prompt_len + tokens :]),
            self.detokenizer.text[characters : self._final_characters()],
            None if self.params.logprobs is None else tuple(self.logprobs[tokens:]),
            self.finish_reason,
            self.stop_reason,
            weight_version,
            self.cumulative_logprob,
            self.drafted,
            self.accepted,
            None if tokens or self.index or self.params.prompt_logprobs is None else tuple(self.prompt_logprobs),
        )

    def told(self, update: Update) -> None:
        """This one is on its way: the next begins after it."""
        told = self._told
        if told.update is not update:
            self._told = _Told(update, told.tokens + len(update.token_ids), told.characters + len(update.text))

    def take_back(self) -> bool:
        """Undo what no update brought: the draws come again, and the same. False: the updates have brought the end."""
        told, update = self._told, self._told.update
        self.siblings = []  # each computes the prompt, or finds it
        if update is not None and update.finish_reason is not None:
            return False
        del self.tokens[self.prompt_len + told.tokens :], self.logprobs[told.tokens :]
        self.detokenizer.restart(self.tokens[self.prompt_len :])
        self.drafted, self.accepted = (update.drafted_tokens, update.accepted_tokens) if update else (0, 0)
        self.cumulative_logprob = update.cumulative_logprob if update else 0.0
        self.finish_reason = self.stop_reason = None
        return True

    def leave(self) -> None:
        """Hold no block any more: what was computed has to be found or computed again."""
        self.blocks, self.draft, self.forks, self.computed = no_blocks(), [], [], 0

    def _final_characters(self) -> int:
        """How much of the text no stop string can take back: all but the longest end that one begins with."""
        text = self.detokenizer.text
        if self.finish_reason is not None:
            return len(text)
        begun = [n for stop in self.params.stop for n in range(1, len(stop)) if text.endswith(stop[:n])]
        return len(text) - max(begun, default=0)
