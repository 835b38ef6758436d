"""What the endpoints of a server share, and how each of them gets its requests into the engine."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fastsft.engine.prompts import encode_prompt
from fastsft.engine.request import PromptError, QueueFull, Request, RequestError, SamplingParams
from fastsft.engine.server.async_engine import AsyncEngine, EngineFailed, Stream, TimedOut
from fastsft.engine.server.errors import ApiError, invalid
from fastsft.engine.server.metrics import Metrics
from fastsft.engine.server.pieces import Pieces
from fastsft.engine.server.settings import ServerSettings

T = TypeVar("T")
_SECONDS_TO_RETRY = 1  # a queue changes with every step


class Context:
    """One server's engine, metrics and settings.

    Args:
        adapters: names that clients may call instead of the model's, to get it with that adapter.
    """

    def __init__(
        self, engine: AsyncEngine, settings: ServerSettings, max_model_len: int, adapters: tuple[str, ...]
    ) -> None:
        if settings.model in adapters:
            raise ValueError(f"serve: adapters: expected other names than the model's, got {settings.model!r}")
        self.engine, self.settings, self.max_model_len, self.adapters = engine, settings, max_model_len, adapters
        self.tokenizer = engine.tokenizer
        self.started = int(time.time())
        self.metrics = Metrics(engine, settings.model)
        self.pieces = Pieces(engine.tokenizer)

    def adapter(self, model: str | None) -> str | None:
        """The adapter that a request's ``model`` names; None is the model as it is.

        Raises:
            ApiError: no name of this server.
        """
        if model in (None, self.settings.model):
            return None
        if model not in self.adapters:
            expected = " or ".join(map(repr, (self.settings.model, *self.adapters)))
            raise ApiError(
                404, f"model: expected {expected}, got {model!r:.200}", param="model", code="model_not_found"
            )
        return model

    async def encode(self, prompt: str | list[int], name: str = "prompt") -> list[int]:
        """Ids of a prompt, with what the tokenizer puts before every text."""
        if not isinstance(prompt, str):
            return prompt
        return (await self.tokenize(lambda: encode_prompt(self.tokenizer, prompt), name))[1]

    async def tokenize(self, work: Callable[[], T], name: str) -> T:
        """Long texts take their time: it is not the loop's."""
        try:
            return await asyncio.to_thread(work)
        except PromptError as error:
            raise ApiError(400, f"{name}: {error.problem}", param=name) from None
        except ValueError as error:  # TemplateError among them
            raise invalid(error, name) from None

    def check_choices(self, count: int) -> None:
        """Raise an ApiError for too many continuations."""
        if count > (most := self.settings.max_choices):
            message = f"n: expected at most {most} continuations of all prompts together, got {count}"
            raise ApiError(400, message, param="n")

    async def submit(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        adapter: str | None,
        name: str = "prompt",
    ) -> Stream:
        """Queue a request for each prompt. Whoever gets the stream must close it.

        Raises:
            ApiError: what the engine says of them.
        """
        self.check_choices(len(prompts) * (params.best_of or params.n))
        requests = [Request(uuid.uuid4().hex, tuple(ids), params, adapter=adapter) for ids in prompts]
        try:
            return await self.engine.submit(
                requests, seconds=self.settings.request_seconds, observe=self.metrics.observer(requests)
            )
        except Exception as error:
            raise api_error(error, name) from None

    def identity(self, kind: str, model: str | None) -> dict[str, Any]:
        """What every answer of OpenAI's API begins with."""
        return {
            "id": f"{kind}-{uuid.uuid4().hex}",
            "model": model or self.settings.model,
            "system_fingerprint": f"weights-{self.engine.snapshot.weight_version}",
        }


def api_error(error: Exception, name: str = "prompt") -> ApiError:
    """Of what the engine raised."""
    if isinstance(error, RequestError):
        if str(error).startswith("params: "):
            return invalid(error)
        return ApiError(400, f"{name}: {error}", param=name, code="invalid_prompt")
    if isinstance(error, QueueFull):
        retry = {"Retry-After": str(_SECONDS_TO_RETRY)}
        return ApiError(503, f"the queue is full: {error}", code="queue_full", headers=retry)
    if isinstance(error, ImportError):  # of a package that only some requests need
        return ApiError(501, str(error))
    if isinstance(error, TimedOut):
        return ApiError(504, str(error), code="timeout")
    if isinstance(error, EngineFailed):
        return ApiError(503, str(error), code="engine_failed", headers={"Retry-After": str(_SECONDS_TO_RETRY)})
    raise error
