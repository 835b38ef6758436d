"""``/v1/chat/completions``: conversations, written out by the model's template."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive

from fastsft.engine.assemble import Assembly
from fastsft.engine.prompts import encode_chat
from fastsft.engine.request import SamplingParams, Update
from fastsft.engine.server.async_engine import EngineFailed, Stream, TimedOut
from fastsft.engine.server.context import Context, api_error
from fastsft.engine.server.errors import ApiError, json_response
from fastsft.engine.server.protocol import ChatBody
from fastsft.engine.server.sse import EventStream, unless_gone
from fastsft.engine.server.usage import Usage


async def chat(context: Context, body: ChatBody, receive: Receive) -> Response:
    adapter = context.adapter(body.model)
    ids = await encode_messages(context, body.messages, body.chat_template_kwargs)
    params = _params(context, body, len(ids))
    stream = await context.submit([ids], params, adapter, "messages")
    one = _Answer(context, body, params, stream)
    if body.stream:
        return EventStream(one.events(), stream.close, ping_seconds=context.settings.ping_seconds)
    with stream:
        return json_response(await unless_gone(receive, one.whole()))


async def encode_messages(context: Context, messages: list[dict[str, Any]], template: dict[str, Any]) -> list[int]:
    """Ids of a conversation with the generation prompt."""
    if not messages:
        raise ApiError(400, "messages: expected at least one, got an empty list", param="messages")
    if taken := {"messages", "add_generation_prompt"} & template.keys():
        raise ApiError(400, f"chat_template_kwargs: {min(taken)} is set already", param="chat_template_kwargs")
    plain = [_plain(message, f"messages[{i}]") for i, message in enumerate(messages)]
    _, ids = await context.tokenize(lambda: encode_chat(context.tokenizer, plain, **template), "messages")
    return ids


def _plain(message: dict[str, Any], name: str) -> dict[str, Any]:
    """With its content as one text, which OpenAI's clients may send in parts."""
    if not isinstance(message.get("role"), str):
        raise ApiError(400, f"{name}.role: expected a string, got {message.get('role')!r:.200}", param="messages")
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise ApiError(400, f"{name}.content: expected parts of type text, got {part!r:.200}", param="messages")
        content = "".join(part["text"] for part in content)
    elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise ApiError(400, f"{name}.content: expected a string, got {content!r:.200}", param="messages")
    return {**message, "content": content}


def _params(context: Context, body: ChatBody, prompt: int) -> SamplingParams:
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError(400, "max_tokens: max_completion_tokens says the same, got both", param="max_tokens")
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs: only with logprobs", param="top_logprobs")
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    limit = max(1, context.max_model_len - prompt) if asked is None else asked
    return body.sampling(max_tokens=limit, logprobs=body.top_logprobs if body.logprobs else None)


class _Answer:
    """One request's answer, whole or piece by piece."""

    def __init__(self, context: Context, body: ChatBody, params: SamplingParams, stream: Stream) -> None:
        self._context, self._body, self._params, self._stream = context, body, params, stream
        self._identity = {**context.identity("chatcmpl", body.model), "created": int(time.time())}
        self._usage = Usage(len(stream.requests[0].prompt_token_ids))

    async def whole(self) -> dict[str, Any]:
        assembly = Assembly(self._stream.requests[0])
        try:
            async for updates in self._stream:
                for update in updates:
                    assembly.take(update)
                    self._usage.take(update)
        except (EngineFailed, TimedOut) as error:
            raise api_error(error) from None
        choices = [
            {"index": one.index, "message": {"role": "assistant", "content": one.text, "refusal": None},
             "logprobs": self._logprobs(one.token_ids, one.logprobs), "finish_reason": one.finish_reason}
            for one in assembly.output().outputs
        ]  # fmt: skip
        return {**self._identity, "object": "chat.completion", "choices": choices, "usage": self._usage.shown()}

    async def events(self) -> AsyncGenerator[list[dict[str, Any]], None]:
        with_usage = self._body.stream_options.include_usage
        head = {**self._identity, "object": "chat.completion.chunk", **({"usage": None} if with_usage else {})}

        def chunk(index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            return {**head, "choices": [choice]}

        def chunks(update: Update) -> Iterator[dict[str, Any]]:
            logprobs = self._logprobs(update.token_ids, update.logprobs)
            if update.text or (logprobs and update.token_ids):
                yield chunk(update.index, {"content": update.text}, logprobs)
            if update.finish_reason is not None:
                yield chunk(update.index, {}, None, update.finish_reason)

        yield [chunk(index, {"role": "assistant", "content": ""}) for index in range(self._params.n)]
        try:
            async for updates in self._stream:
                for update in updates:
                    self._usage.take(update)
                yield [one for update in updates for one in chunks(update)]
        except (EngineFailed, TimedOut) as error:
            raise api_error(error) from None
        if with_usage:
            yield [{**head, "choices": [], "usage": self._usage.shown()}]

    def _logprobs(self, tokens: tuple[int, ...], each: tuple[dict[int, float], ...] | None) -> dict[str, Any] | None:
        if each is None:
            return None
        return self._context.pieces.chat_logprobs(tokens, each, self._params.logprobs or 0)
