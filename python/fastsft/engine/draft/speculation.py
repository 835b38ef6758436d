"""Speculative decoding of an engine: a guess for each continuation, as long as pays.

Results do not depend on it, but for the draws of a draft model with rejection sampling."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastsft.engine.draft.guess import Guess
from fastsft.engine.draft.heads import DeviceHeads, HeadsGuess, PackedHeads
from fastsft.engine.draft.length import DraftLength, Shares
from fastsft.engine.draft.model import DraftModel, ModelGuess
from fastsft.engine.draft.ngram import NgramGuess
from fastsft.engine.draft.options import speculative_options
from fastsft.engine.draft.suffix import SuffixGuess, corpus_automaton
from fastsft.engine.sequence import Sequence
from fastsft.engine.tree import rows_of
from fastsft.models.device import DeviceDecoder
from fastsft.models.packed import PackedDecoder
from fastsft.models.tokenizer import Tokenizer


@dataclass
class _State:
    guess: Guess
    shares: Shares
    others: Shares
    asked: bool = False


class Speculation:
    """The engine's :class:`~fastsft.engine.step.Drafter`.

    Args:
        make: a guess for the text of a sequence.
        most: drafts of one continuation in a step.
        paths: of one continuation in a step: the drafts, and those with another guess in one of the first places.
        adaptive: False drafts ``most`` tokens whenever there is a guess, on all ``paths``.
        needs_hidden: guesses are made from ``Sequence.hidden_D``.
    """

    def __init__(
        self,
        make: Callable[[Sequence], Guess],
        *,
        most: int = 8,
        paths: int = 1,
        adaptive: bool = True,
        needs_hidden: bool = False,
    ) -> None:
        self._make, self._most, self._paths, self._adaptive = make, most, paths, adaptive
        self.needs_hidden = needs_hidden
        self._length = DraftLength(most)
        self._states: dict[Sequence, _State] = {}

    def begin(self, sequences: int) -> bool:
        return self._length.begin(sequences) or not self._adaptive

    def propose(self, sequence: Sequence, limit: int) -> list[list[int]]:
        begin = time.perf_counter()
        state = self._states.get(sequence)
        if state is None:
            shares, others = (Shares(self._most, x) for x in (self._length.shares, self._length.others))
            state = self._states[sequence] = _State(self._make(sequence), shares, others)
        count = self._length.choose(state.shares, limit) if self._adaptive else min(limit, self._most)
        chosen = time.perf_counter()
        self._length.chose(chosen - begin)
        if count == 0:
            return []
        first, state.asked = not state.asked, True
        draft = state.guess.propose(sequence.tokens, count)
        self._length.proposed(state.shares, len(draft), time.perf_counter() - chosen, first=first)
        paths = [draft] if draft else []
        if draft and self._paths > 1:
            paths += self._branches(state, draft, first)
        return paths

    def _branches(self, state: _State, draft: list[int], first: bool) -> list[list[int]]:
        begin = time.perf_counter()
        count = min(self._paths - 1, len(draft))
        if self._adaptive:
            count = self._length.branches(state.shares, state.others, count)
        others = state.guess.others(count)
        seconds = time.perf_counter() - begin
        self._length.branched(state.shares, state.others, len(others), seconds, first=first)
        return [[*draft[:place], token] for place, token in enumerate(others)]

    def observe(self, sequence: Sequence, paths: list[list[int]], best: int, accepted: int) -> None:
        state = self._states[sequence]
        held = min(accepted, best - 1) if best else accepted  # of the first path; the text may end before the branch
        self._length.observe(state.shares, len(paths[0]), held, rows_of(paths) - 1)
        if held < accepted:
            self._length.observe_other(state.others, held, True)
        elif held + 1 < len(paths) and sequence.finish_reason is None:  # there was another guess where the first failed
            self._length.observe_other(state.others, held, False)

    def forget(self, sequence: Sequence) -> None:
        if (state := self._states.pop(sequence, None)) is not None:
            state.guess.close()

    def measured(self, rows: int, seconds: float) -> None:
        self._length.measured(rows, seconds)


def speculation_from(
    config: Mapping[str, Any], tokenizer: Tokenizer, target: PackedDecoder | DeviceDecoder
) -> Speculation:
    """From ``speculative_config``.

    Args:
        target: the model that the drafts are for.

    Raises:
        ValueError: as :func:`speculative_options` does, or a model or heads that do not fit the target.
    """
    options = speculative_options(config)
    method, most = options["method"], options["num_speculative_tokens"]
    paths = options.get("num_speculative_paths", 1)
    make: Callable[[Sequence], Guess]
    if method == "ngram":

        def make(sequence: Sequence) -> Guess:
            return NgramGuess(options["prompt_lookup_max"], options["prompt_lookup_min"])
    elif method == "draft_model":
        draft = DraftModel(
            options["model"],
            tokenizer,
            target.config.vocab_size,
            kv_cache_bytes=options["kv_cache_bytes"],
            rejection=options["acceptance"] == "rejection",
            device=target.device,
        )

        def make(sequence: Sequence) -> Guess:
            return ModelGuess(draft, sequence, paths - 1)
    elif method == "heads":
        heads: PackedHeads | DeviceHeads
        if isinstance(target, PackedDecoder):
            heads = PackedHeads(options["model"], target)
        else:
            heads = DeviceHeads(options["model"], target)
        most = min(most, heads.count)

        def make(sequence: Sequence) -> Guess:
            return HeadsGuess(heads, sequence, paths - 1)
    else:
        texts = list(options["corpus"])
        corpus = corpus_automaton(tokenizer.encode_text(texts)) if texts else None

        def make(sequence: Sequence) -> Guess:
            return SuffixGuess(corpus, options["min_match"])

    return Speculation(
        make,
        most=most,
        paths=paths,
        adaptive=options["adaptive"],
        needs_hidden=method == "heads",
    )
