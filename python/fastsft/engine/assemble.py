"""Puts the updates of a request together, for who wants the whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from fastsft.engine.request import CompletionOutput, Request, RequestOutput, Update


@dataclass
class _Continuation:
    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    weight_versions: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    cumulative_logprob: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class Drawn(Protocol):
    finish_reason: str | None
    cumulative_logprob: float


AnyDrawn = TypeVar("AnyDrawn", bound=Drawn)


def best(drawn: Iterable[AnyDrawn], count: int) -> list[AnyDrawn]:
    """The ``count`` most probable ones, those that no token could go on from last; of equal ones, the first drawn."""
    return sorted(drawn, key=lambda one: (one.finish_reason == "error", -one.cumulative_logprob))[:count]


class Assembly:
    """One request's continuations, as far as they have come."""

    def __init__(self, request: Request, prompt: str | None = None) -> None:
        self.request, self._prompt = request, prompt
        self._prompt_logprobs: tuple[dict[int, float] | None, ...] | None = None
        self._all = [_Continuation() for _ in range(request.params.best_of or request.params.n)]
        self.count, self.finished = len(self._all), 0
        """Continuations that are drawn, and that have ended."""
        self.generated = 0
        """Tokens of all of them."""

    @property
    def ended(self) -> bool:
        return self.finished == self.count

    def take(self, update: Update) -> None:
        one = self._all[update.index]
        one.token_ids += update.token_ids
        one.texts.append(update.text)
        one.logprobs += update.logprobs or ()
        self._prompt_logprobs = update.prompt_logprobs or self._prompt_logprobs
        if update.token_ids and update.weight_version not in one.weight_versions[-1:]:
            one.weight_versions.append(update.weight_version)
        self.generated += len(update.token_ids)
        self.finished += update.finish_reason is not None
        one.finish_reason, one.stop_reason = update.finish_reason, update.stop_reason
        one.cumulative_logprob = update.cumulative_logprob
        one.drafted_tokens, one.accepted_tokens = update.drafted_tokens, update.accepted_tokens

    def output(self) -> RequestOutput:
        """Of a finished request."""
        params, kept = self.request.params, self._all
        if params.best_of is not None:
            kept = best(kept, params.n)
        outputs = tuple(
            CompletionOutput(
                index, "".join(c.texts), tuple(c.token_ids), c.finish_reason or "length", c.stop_reason,
                None if params.logprobs is None else tuple(c.logprobs), tuple(c.weight_versions),
                c.cumulative_logprob, c.drafted_tokens, c.accepted_tokens,
            )
            for index, c in enumerate(kept)
        )  # fmt: skip
        return RequestOutput(self._prompt, self.request.prompt_token_ids, outputs, self._prompt_logprobs)
