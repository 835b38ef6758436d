"""The server's endpoints."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, Response

from fastsft.engine.core import EngineCore
from fastsft.engine.server.async_engine import AsyncEngine
from fastsft.engine.server.chat import chat, encode_messages
from fastsft.engine.server.completions import complete
from fastsft.engine.server.context import Context
from fastsft.engine.server.errors import ApiError, json_response
from fastsft.engine.server.guard import Guard
from fastsft.engine.server.infill import infill
from fastsft.engine.server.page import page_and_policy
from fastsft.engine.server.protocol import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    InfillBody,
    TokenizeBody,
)
from fastsft.engine.server.settings import ServerSettings
from fastsft.engine.server.sse import ClientGone

B = TypeVar("B", bound=Body)
_CLIENT_GONE = 499  # nginx's: nobody gets it, but the metrics count it
_MAX_DEPTH = 64  # of a body: what walks through it is recursive, here and in templates and schemas


def make_app(core: EngineCore, settings: ServerSettings) -> FastAPI:
    """An ASGI application around ``core``, which belongs to it from its start to its end."""
    engine = AsyncEngine(core)
    context = Context(engine, settings, core.max_model_len, core.adapters)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await engine.stop()

    app = FastAPI(title="fastsft", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.engine = engine
    app.add_middleware(Guard, settings=settings, answered=context.metrics.answered)
    _add_errors(app)
    _add_generation(app, context)
    _add_tokens(app, context)
    _add_state(app, context)
    return app


def _add_generation(app: FastAPI, context: Context) -> None:
    @app.post("/v1/completions", openapi_extra=_schema(CompletionBody))
    async def completions(request: Request) -> Response:
        return await complete(context, await _body(request, CompletionBody), request.receive)

    @app.post("/v1/chat/completions", openapi_extra=_schema(ChatBody))
    async def chat_completions(request: Request) -> Response:
        return await chat(context, await _body(request, ChatBody), request.receive)

    @app.post("/infill", openapi_extra=_schema(InfillBody))
    async def infills(request: Request) -> Response:
        return await infill(context, await _body(request, InfillBody), request.receive)


def _add_tokens(app: FastAPI, context: Context) -> None:
    @app.post("/tokenize", openapi_extra=_schema(TokenizeBody))
    async def tokenize(request: Request) -> Response:
        body = await _body(request, TokenizeBody)
        context.adapter(body.model)
        given = {"prompt": body.prompt, "content": body.content, "messages": body.messages}
        names = [name for name, value in given.items() if value is not None]
        if len(names) != 1:
            raise ApiError(400, f"expected one of prompt, content and messages, got {', '.join(names) or 'none'}")
        body.no_more_fields()
        text = body.prompt or body.content or ""
        if body.messages is not None:
            ids = await encode_messages(context, body.messages, {})
        elif body.add_special or (body.prompt is not None and body.add_special_tokens):
            ids = await context.encode(text, names[0])
        else:
            ids = await context.tokenize(lambda: context.tokenizer.encode(text), names[0])
        return json_response({"tokens": ids, "count": len(ids), "max_model_len": context.max_model_len})

    @app.post("/detokenize", openapi_extra=_schema(DetokenizeBody))
    async def detokenize(request: Request) -> Response:
        body = await _body(request, DetokenizeBody)
        context.adapter(body.model)
        body.no_more_fields()
        if wrong := [i for i in body.tokens if not 0 <= i < 1 << 32]:
            raise ApiError(400, f"tokens: expected token ids, got {wrong[0]}", param="tokens")
        text = await context.tokenize(lambda: context.tokenizer.decode(body.tokens, False), "tokens")
        return json_response({"prompt": text, "content": text})


def _add_state(app: FastAPI, context: Context) -> None:
    page, policy = page_and_policy()

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})

    @app.get("/health")
    async def health() -> Response:
        if not context.engine.alive:
            return json_response({"status": "stopping"}, 503)
        return json_response({"status": "ok"})

    def described(name: str) -> dict[str, Any]:
        model = context.settings.model
        return {
            "id": name, "object": "model", "created": context.started, "owned_by": "fastsft",
            "max_model_len": context.max_model_len, "parent": None if name == model else model,
        }  # fmt: skip

    @app.get("/v1/models")
    async def models() -> Response:
        names = (context.settings.model, *context.adapters)
        return json_response({"object": "list", "data": [described(name) for name in names]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        context.adapter(name)
        return json_response(described(name))

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(context.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(ClientGone)
    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=_CLIENT_GONE)

    @app.exception_handler(Exception)
    async def failure(request: Request, error: Exception) -> Response:  # its traceback is logged by the server
        return ApiError(500, "the server failed; its log says why").response()


async def _body(request: Request, kind: type[B]) -> B:
    """A web page elsewhere may send forms and plain text unasked, but JSON only where the server allows it."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise ApiError(415, f"Content-Type: expected application/json, got {media!r:.200}")
    try:
        body = await request.body()
        raw = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"the body: expected JSON, got what is none: {error}") from None
    if body.count(b"[") + body.count(b"{") > _MAX_DEPTH and _deeper(raw, _MAX_DEPTH):  # most bodies have fewer
        raise ApiError(400, f"the body: expected at most {_MAX_DEPTH} levels of objects and lists, got more")
    return kind.parse(raw)


def _deeper(value: Any, most: int) -> bool:
    """Whether lists and objects stand in one another more than ``most`` times."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(most):
        inside = [item.values() if isinstance(item, dict) else item for item in level]
        level = [item for items in inside for item in items if isinstance(item, (dict, list))]
    return bool(level)


def _schema(kind: type[Body]) -> dict[str, Any]:
    content = {"application/json": {"schema": kind.model_json_schema()}}
    return {"requestBody": {"content": content, "required": True}}
