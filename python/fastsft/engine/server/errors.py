"""What goes wrong, in the words of OpenAI's API."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response


class ApiError(Exception):
    """An answer other than 200.

    Attributes:
        param: the field of the request that is to blame.
        headers: Retry-After and the like.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return json_response(self.body(), self.status, self.headers)


def invalid(error: ValueError, param: str | None = None) -> ApiError:
    """Of a value that the engine refused: its message begins with the name of a field, where one is to blame."""
    message = re.sub(r"^StructuredOutputs:", "structured_outputs:", str(error))
    message = re.sub(r"^(SamplingParams|params|infill): ", "", message)
    named = re.match(r"(\w+):", message) if message != str(error) else None
    return ApiError(400, message, param=named[1] if named else param)


_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


def to_json(value: Any) -> str:
    """Only ASCII, as messages repeat what clients sent, lone surrogates too. JSON has no infinity: -9999 stands for a
    log-probability of -inf, as in vLLM."""
    try:
        return _encode(value)
    except ValueError:  # rare: to look for it each time would take longer than the rest
        return _encode(_finite(value))


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, media_type="application/json")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return -9999.0
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
