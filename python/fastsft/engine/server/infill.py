"""``/infill``: the protocol of llama.cpp's server, which editors speak."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive

from fastsft.engine.prompts import encode_infill, ending_with
from fastsft.engine.request import Update
from fastsft.engine.server.async_engine import EngineFailed, TimedOut
from fastsft.engine.server.context import Context, api_error
from fastsft.engine.server.errors import json_response
from fastsft.engine.server.protocol import ExtraFile, InfillBody
from fastsft.engine.server.sse import EventStream, unless_gone
from fastsft.models.fim import Fim
from fastsft.models.tokenizer import Tokenizer


async def infill(context: Context, body: InfillBody, receive: Receive) -> Response:
    adapter = context.adapter(body.model)
    ids, ends = await context.tokenize(lambda: _encode(context.tokenizer, body), "input_prefix")
    limit = max(1, context.max_model_len - len(ids) if body.n_predict < 0 else body.n_predict)
    given = {"temperature": 0.0} if "temperature" not in (body.model_extra or {}) else {}
    params = ending_with(body.sampling(max_tokens=limit, **given), ends)
    stream = await context.submit([ids], params, adapter, "input_prefix")
    middle = Middle(body)

    def event(update: Update) -> dict[str, Any]:
        text = middle.take(update)
        if middle.stop_type is None:
            return {"index": 0, "content": text, "tokens": list(update.token_ids), "stop": False}
        return {**middle.result(context, len(ids), params), "content": text}

    async def events() -> AsyncGenerator[list[dict[str, Any]], None]:
        try:
            async for updates in stream:
                found = []
                for update in updates:
                    found.append(event(update))
                    if middle.stop_type is not None:
                        yield found
                        return
                yield found
        except (EngineFailed, TimedOut) as error:
            raise api_error(error) from None

    async def whole() -> dict[str, Any]:
        result: dict[str, Any] = {}
        async for found in events():
            result = found[-1]
        return _selected({**result, "content": middle.text}, body.response_fields)

    if body.stream:
        return EventStream(events(), stream.close, ping_seconds=context.settings.ping_seconds, done=False)
    with stream:
        return json_response(await unless_gone(receive, whole()))


def _encode(tokenizer: Tokenizer, body: InfillBody) -> tuple[list[int], tuple[int, ...]]:
    """Other files before the prefix, with the tokens that the model's format has for them."""
    ids, ends = encode_infill(tokenizer, body.input_prefix, body.input_suffix, order=body.order)
    start = len(tokenizer.prefix_ids)
    (middle,) = tokenizer.encode_text([body.prompt], continues=True)
    return [*ids[:start], *_extra(tokenizer, body.input_extra), *ids[start:], *middle], ends


def _extra(tokenizer: Tokenizer, files: list[ExtraFile]) -> list[int]:
    if not files:
        return []
    format = Fim.find(tokenizer).format
    marker = tokenizer.token_id(format.file) if format.file else None
    if marker is None:  # as llama.cpp does for models that were not trained on repositories
        texts = [f"\n\n--- snippet ---\n\n{file.text}" for file in files]
        return [i for ids in tokenizer.encode_text(texts) for i in ids]
    ids: list[int] = []
    if format.repository and (repository := tokenizer.token_id(format.repository)) is not None:
        ids += [repository, *tokenizer.encode_text([f"repository{format.name_end}"])[0]]
    for file in files:
        ids += [marker, *tokenizer.encode_text([f"{file.filename}\n{file.text}{format.file_end}"])[0]]
    return [*ids, marker]


class Middle:
    """The text of an answer, with llama.cpp's two further ends: a line that is indented less than asked for, and a line
    that is over after the time was up."""

    def __init__(self, body: InfillBody) -> None:
        self._body, self._started, self._first = body, time.perf_counter(), 0.0
        self.text = ""
        self.tokens: list[int] = []
        self.stop_type: str | None = None
        self.stop_word = ""

    def take(self, update: Update) -> str:
        """What there is to show."""
        self._first = self._first or time.perf_counter()
        if self._body.n_predict == 0:  # an editor has its files read while nobody waits
            self.stop_type = "limit"
            return ""
        self.tokens += update.token_ids
        begin = len(self.text)
        self.text += update.text
        if update.finish_reason == "length":
            self.stop_type = "limit"
        elif update.finish_reason is not None:
            self.stop_type = "word" if isinstance(update.stop_reason, str) else "eos"
            self.stop_word = update.stop_reason if isinstance(update.stop_reason, str) else ""
        self._cut(begin)
        return self.text[begin:]

    def _cut(self, begin: int) -> None:
        line = self.text.rfind("\n", 0, begin) + 1  # the last one that began before
        while (at := self.text.find("\n", max(line - 1, 0))) >= 0:
            following = self.text[at + 1 :]
            indent = len(following) - len(following.lstrip(" \t"))
            if indent < self._body.n_indent and following[indent:] and following[indent] != "\n":
                self.text, self.stop_type = self.text[: max(at, begin)], "limit"
                return
            line = at + 2
        late = self._body.t_max_predict_ms and (time.perf_counter() - self._first) * 1e3 > self._body.t_max_predict_ms
        if self.stop_type is None and late and "\n" in self.text[begin:]:
            self.stop_type = "limit"

    def result(self, context: Context, prompt: int, params: Any) -> dict[str, Any]:
        now = time.perf_counter()
        settings = {k: v for k, v in dataclasses.asdict(params).items() if v is not None}
        return {
            "index": 0, "content": self.text, "tokens": self.tokens, "stop": True, "id_slot": 0,
            "model": self._body.model or context.settings.model,
            "tokens_predicted": len(self.tokens), "tokens_evaluated": prompt,
            "generation_settings": settings, "has_new_line": "\n" in self.text, "truncated": False,
            "stop_type": self.stop_type, "stopping_word": self.stop_word, "tokens_cached": prompt + len(self.tokens),
            "timings": {
                **_timing("prompt", prompt, self._first - self._started),
                **_timing("predicted", len(self.tokens), now - self._first),
            },
        }  # fmt: skip


def _timing(name: str, count: int, seconds: float) -> dict[str, float]:
    return {
        f"{name}_n": count, f"{name}_ms": seconds * 1e3, f"{name}_per_token_ms": seconds * 1e3 / max(count, 1),
        f"{name}_per_second": count / seconds if seconds > 0 else 0.0,
    }  # fmt: skip


def _selected(result: dict[str, Any], paths: list[str]) -> dict[str, Any]:
    """``a/b`` is the field b of the field a, under the name ``a/b``; what is not there is left out."""
    if not paths:
        return result
    found: dict[str, Any] = {}
    for path in paths:
        value: Any = result
        for name in path.split("/"):
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            found[path] = value
    return found
