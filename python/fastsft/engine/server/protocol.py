"""Bodies of requests, and the engine's requests that they stand for.

A body's own fields are declared; the others are those of SamplingParams under the same names. Fields of OpenAI's that
do not change the output are accepted without effect, and those that would, at the value at which they do not. Any
other one is an error that names it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, Literal, TypeVar

import pydantic

from fastsft.engine.guide import StructuredOutputs
from fastsft.engine.request import SamplingParams
from fastsft.engine.server.errors import ApiError, invalid

# Of prompts, the endpoints have none to report but those of `echo`.
_SAMPLING = {f.name for f in dataclasses.fields(SamplingParams)} - {"prompt_logprobs"}
_WITHOUT_EFFECT = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",
}  # fmt: skip
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
    "modalities": (["text"],),
}  # fmt: skip
_MAX_GUIDE = 1 << 16  # characters: others wait while a schema is compiled
# llama.cpp's: how it goes about its work, and its order of samplers.
_OF_LLAMA_CPP = {"id_slot", "cache_prompt", "t_max_prompt_ms", "samplers", "timings_per_token"}

B = TypeVar("B", bound="Body")


class Body(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow", strict=True)

    model: str | None = None
    stream: bool = False

    @classmethod
    def parse(cls: type[B], raw: Any) -> B:
        """
        Args:
            raw: what the JSON held. A null is a field that is not there.

        Raises:
            ApiError: the first field that is wrong, by name.
        """
        if not isinstance(raw, dict):
            raise ApiError(400, f"the body: expected a JSON object, got {raw!r:.200}")
        try:
            return cls.model_validate({name: value for name, value in raw.items() if value is not None})
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            name = str((*first["loc"], "the body")[0])
            got = "" if first["type"] == "missing" else f", got {raw.get(name, raw)!r:.200}"
            raise ApiError(400, f"{name}: {first['msg']}{got}", param=name) from None

    def sampling(self, **own: Any) -> SamplingParams:
        """
        Args:
            own: what the body's declared fields say; the fields that are not declared are added.

        Raises:
            ApiError: a field that is unknown, or that has no such value.
        """
        known = self.sampled()
        given = {name: value for name, value in (self.model_extra or {}).items() if name in known}
        self.no_more_fields(known)
        if isinstance(bias := given.get("logit_bias"), dict):
            given["logit_bias"] = {_id(name): value for name, value in bias.items()}
        try:
            params = SamplingParams(**{"temperature": 1.0, **given, **own})
        except ValueError as error:
            raise invalid(error) from None
        guided = params.structured_outputs
        if isinstance(guided, StructuredOutputs) and (size := len(guided.format_and_text()[1])) > _MAX_GUIDE:
            message = f"structured_outputs: expected at most {_MAX_GUIDE} characters, got {size}"
            raise ApiError(400, message, param="structured_outputs")
        return params

    def no_more_fields(self, known: Collection[str] = ()) -> None:
        """
        Raises:
            ApiError: a field that is not declared, not ``known`` and not without effect.
        """
        for name, value in sorted((self.model_extra or {}).items()):
            if name in known or name in self.accepted() or value in _NEUTRAL.get(name, ()):
                continue
            if name in _NEUTRAL:
                raise ApiError(400, f"{name}: not supported, got {value!r:.200}", param=name)
            raise ApiError(400, f"{name}: this server does not know the field", param=name)

    @classmethod
    def sampled(cls) -> set[str]:
        """Fields of SamplingParams that may be there."""
        return _SAMPLING

    @classmethod
    def accepted(cls) -> set[str]:
        """Fields that may be there and change nothing."""
        return _WITHOUT_EFFECT


class StreamOptions(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False  # OpenAI's padding against readers of encrypted traffic: none is sent


class OpenAIBody(Body):
    n: int = 1
    stream_options: StreamOptions = StreamOptions()
    response_format: dict[str, Any] = {"type": "text"}

    def sampling(self, **own: Any) -> SamplingParams:
        if "stream_options" in self.model_fields_set and not self.stream:
            raise ApiError(400, "stream_options: only with stream", param="stream_options")
        if (schema := self._schema()) is not None:
            if "structured_outputs" in (self.model_extra or {}):
                message = "response_format: structured_outputs says the same, got both"
                raise ApiError(400, message, param="response_format")
            own["structured_outputs"] = {"json": schema}
        params = super().sampling(n=self.n, **own)
        if self.stream and (params.best_of or self.n) > self.n:
            raise ApiError(400, "best_of: not with stream: the best one is known at the end", param="best_of")
        return params

    def _schema(self) -> dict[str, Any] | None:
        """That the text must match."""
        match self.response_format:
            case {"type": "text"}:
                return None
            case {"type": "json_object"}:
                return {"type": "object"}
            case {"type": "json_schema", "json_schema": {"schema": dict() as schema}}:
                return schema
        expected = "text, json_object, or json_schema with a schema"
        message = f"response_format: expected {expected}, got {self.response_format!r:.200}"
        raise ApiError(400, message, param="response_format")


class CompletionBody(OpenAIBody):
    prompt: str | list[str] | list[int] | list[list[int]]
    suffix: str | None = None
    echo: bool = False
    max_tokens: int = 16
    logprobs: int | None = None


class ChatBody(OpenAIBody):
    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = pydantic.Field(0, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] = {}


class ExtraFile(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="ignore", strict=True)

    filename: str = ""
    text: str


class InfillBody(Body):
    """llama.cpp's ``/infill``. ``prompt`` is the beginning of the middle: what stands before the cursor in its line."""

    input_prefix: str = ""
    input_suffix: str = ""
    input_extra: list[ExtraFile] = []
    prompt: str = ""
    n_predict: int = -1  # below 0: as many as there is room for; 0: none, the prompt is read into the cache
    n_indent: int = 0
    t_max_predict_ms: float = 0
    response_fields: list[str] = []
    order: Literal["psm", "spm"] = "psm"

    @classmethod
    def sampled(cls) -> set[str]:
        return _SAMPLING - {"n", "best_of", "max_tokens", "logprobs"}

    @classmethod
    def accepted(cls) -> set[str]:
        return _WITHOUT_EFFECT | _OF_LLAMA_CPP


class TokenizeBody(Body):
    """vLLM's (``prompt`` or ``messages``) and llama.cpp's (``content``)."""

    prompt: str | None = None
    content: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_special: bool = False


class DetokenizeBody(Body):
    tokens: list[int]


def _id(name: Any) -> Any:
    """A key of a JSON object, which is a string, as the number that it writes."""
    return int(name) if isinstance(name, str) and name.isdecimal() and len(name) < 20 else name
