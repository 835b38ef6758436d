"""``/v1/completions``: prompts as text or ids, one or several, and infills by ``suffix``."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.responses import Response
from starlette.types import Receive

from fastsft.engine.assemble import best
from fastsft.engine.prompts import encode_infill, ending_with
from fastsft.engine.request import SamplingParams, Update
from fastsft.engine.server.async_engine import EngineFailed, Stream, TimedOut
from fastsft.engine.server.context import Context, api_error
from fastsft.engine.server.errors import ApiError, json_response
from fastsft.engine.server.pieces import Offsets
from fastsft.engine.server.protocol import CompletionBody
from fastsft.engine.server.sse import EventStream, unless_gone
from fastsft.engine.server.usage import Usage


@dataclass
class _Choice:
    """A continuation, as far as it has come."""

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float] | None] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)  # of the tokens, in all of the text
    places: Offsets = field(default_factory=Offsets)
    finish_reason: str | None = None
    cumulative_logprob: float = 0.0
    begun: bool = False


async def complete(context: Context, body: CompletionBody, receive: Receive) -> Response:
    adapter = context.adapter(body.model)
    prompts, params = await _prompts_and_params(context, body)
    stream = await context.submit(prompts, params, adapter)
    one = _Completion(context, body, params, prompts, stream)
    if body.stream:
        return EventStream(one.events(), stream.close, ping_seconds=context.settings.ping_seconds)
    with stream:
        return json_response(await unless_gone(receive, one.whole()))


async def _prompts_and_params(context: Context, body: CompletionBody) -> tuple[list[list[int]], SamplingParams]:
    several: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if several and isinstance(several[0], int):
        several = [several]
    if not several:
        raise ApiError(400, "prompt: expected at least one, got an empty list", param="prompt")
    context.check_choices(len(several))
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens: expected at least 1, or echo beside it, got 0", param="max_tokens")
    # The text alone was asked for; the engine has no way to generate nothing, so one token is left out.
    echoed = body.logprobs if body.echo else None
    params = body.sampling(max_tokens=body.max_tokens or 1, logprobs=body.logprobs, prompt_logprobs=echoed)
    if body.suffix is None:
        return [await context.encode(prompt) for prompt in several], params
    if body.echo or not all(isinstance(prompt, str) for prompt in several):
        raise ApiError(400, "suffix: only beside a prompt of text, without echo", param="suffix")
    prompts: list[list[int]] = []
    ends: tuple[int, ...] = ()
    for prompt in several:
        ids, ends = await context.tokenize(partial(encode_infill, context.tokenizer, prompt, body.suffix), "suffix")
        prompts.append(ids)
    return prompts, ending_with(params, ends)


def _texts(context: Context, body: CompletionBody, prompts: list[list[int]]) -> list[str]:
    """The prompts as they came, or as their ids say."""
    given: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if isinstance(given[0], str):
        return given
    return [context.tokenizer.decode(ids, skip_special_tokens=False) for ids in prompts]


class _Completion:
    """One request's answer, whole or piece by piece."""

    def __init__(
        self, context: Context, body: CompletionBody, params: SamplingParams, prompts: list[list[int]], stream: Stream
    ) -> None:
        self._context, self._body, self._params, self._stream = context, body, params, stream
        self._prompts = prompts
        self._echoed = _texts(context, body, prompts) if body.echo else []
        self._identity = {
            **context.identity("cmpl", body.model), "object": "text_completion", "created": int(time.time()),
        }  # fmt: skip
        self._draws = params.best_of or params.n
        self._place = {r.request_id: i for i, r in enumerate(stream.requests)}
        self._choices = [_Choice(i) for i in range(len(prompts) * self._draws)]
        self._of_prompt: dict[str, tuple[dict[int, float] | None, ...]] = {}
        self._usage = Usage(sum(map(len, prompts)))

    async def whole(self) -> dict[str, Any]:
        try:
            async for updates in self._stream:
                for update in updates:
                    self._take(update)
        except (EngineFailed, TimedOut) as error:
            raise api_error(error) from None
        return {**self._identity, "choices": [self._shown(c) for c in self._best()], "usage": self._usage.shown()}

    def _best(self) -> list[_Choice]:
        """Of each prompt's draws as many as were asked for."""
        if self._draws == self._body.n:
            return self._choices
        kept: list[_Choice] = []
        for begin in range(0, len(self._choices), self._draws):
            kept += best(self._choices[begin : begin + self._draws], self._body.n)
        return [dataclasses.replace(choice, index=i) for i, choice in enumerate(kept)]

    async def events(self) -> AsyncGenerator[list[dict[str, Any]], None]:
        with_usage = self._body.stream_options.include_usage
        head = {**self._identity, **({"usage": None} if with_usage else {})}
        try:
            async for updates in self._stream:
                yield [{**head, "choices": [shown]} for update in updates if (shown := self._piece(update)) is not None]
        except (EngineFailed, TimedOut) as error:
            raise api_error(error) from None
        if with_usage:
            yield [{**head, "choices": [], "usage": self._usage.shown()}]

    def _piece(self, update: Update) -> dict[str, Any] | None:
        """What an update adds to its choice, if that can be shown."""
        choice = self._take(update)
        shown = choice.text or choice.finish_reason or self._body.logprobs is not None
        piece = self._shown(choice) if shown else None
        choice.text, choice.tokens, choice.logprobs, choice.offsets = "", [], [], []
        return piece

    def _take(self, update: Update) -> _Choice:
        body, place = self._body, self._place[update.request_id]
        choice = self._choices[place * self._draws + update.index]
        if update.prompt_logprobs is not None:
            self._of_prompt[update.request_id] = update.prompt_logprobs
        if body.echo and not choice.begun:
            choice.text = self._echoed[place]
            choice.tokens += self._prompts[place]
            choice.logprobs += self._of_prompt.get(update.request_id, ())
            if body.logprobs is not None:
                choice.offsets = self._offsets_of_prompt(place)
                choice.places = Offsets(len(choice.text))
        choice.begun = True
        if body.max_tokens:
            choice.text += update.text
            choice.tokens += update.token_ids
            choice.logprobs += update.logprobs or ()
            skip = self._params.skip_special_tokens
            if body.logprobs is not None:
                choice.offsets += [choice.places.next(self._context.pieces.in_text(t, skip)) for t in update.token_ids]
            self._usage.take(update)
        choice.finish_reason = update.finish_reason if body.max_tokens else "length"
        choice.cumulative_logprob = update.cumulative_logprob
        return choice

    def _offsets_of_prompt(self, place: int) -> list[int]:
        """Its last token ends where the text does: what stands before a text (BOS, a space) has no place in it."""
        places = Offsets()
        offsets = [places.next(self._context.pieces.in_text(t, False)) for t in self._prompts[place]]
        return [max(0, offset + len(self._echoed[place]) - places.end) for offset in offsets]

    def _shown(self, choice: _Choice) -> dict[str, Any]:
        logprobs = None
        if self._body.logprobs is not None:
            logprobs = self._context.pieces.completion_logprobs(
                choice.tokens, choice.logprobs, self._body.logprobs, choice.offsets
            )
        return {"index": choice.index, "text": choice.text, "logprobs": logprobs, "finish_reason": choice.finish_reason}
