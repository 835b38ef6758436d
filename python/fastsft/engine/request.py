"""What a caller asks for and gets back, and a sequence's state in between."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

from fastsft.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt; names as in vLLM.

    Attributes:
        n: continuations per prompt; continuation i draws with ``seed + i``.
        temperature: 0 takes the most probable token.
        top_k, top_p, min_p: restrict the draw; 0, 1.0 and 0.0 switch each off.
        seed: the same seed gives the same text whatever else is in the batch; None draws one.
        stop: strings that end the text and are not part of it.
        stop_token_ids: ids that end the text, besides the model's end tokens.
        ignore_eos: go on past the model's end tokens.
        max_tokens, min_tokens: limits on the number of generated tokens.
        logprobs: None, or the number of most probable tokens to report beside the chosen one.

    Raises:
        ValueError: a value out of range; the message names it.
    """

    n: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | tuple[str, ...] | list[str] = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    ignore_eos: bool = False
    max_tokens: int = 128
    min_tokens: int = 0
    logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise ValueError(f"SamplingParams: {name}: expected {expected}, got {getattr(self, name)!r}")

        check(self.n >= 1, "n", "at least 1")
        check(self.temperature >= 0 and math.isfinite(self.temperature), "temperature", "a finite number >= 0")
        check(self.top_k >= 0, "top_k", "at least 0")
        check(0 < self.top_p <= 1, "top_p", "a value in (0, 1]")
        check(0 <= self.min_p <= 1, "min_p", "a value in [0, 1]")
        check(self.seed is None or 0 <= self.seed < 2**62, "seed", "an integer in [0, 2**62)")
        check(self.max_tokens >= 1, "max_tokens", "at least 1")
        check(0 <= self.min_tokens <= self.max_tokens, "min_tokens", "a number in [0, max_tokens]")
        check(self.logprobs is None or 0 <= self.logprobs <= 20, "logprobs", "None or a number in [0, 20]")
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        check(all(self.stop), "stop", "non-empty strings")


@dataclass(frozen=True)
class CompletionOutput:
    """One continuation. ``token_ids`` holds every generated token, an end token included; ``text`` excludes a stop
    string. ``logprobs``: per token, id -> log-probability under the unmodified distribution."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str  # "stop" or "length"
    stop_reason: str | int | None  # the stop string or end token, if one ended it
    logprobs: tuple[dict[int, float], ...] | None = None


@dataclass(frozen=True)
class RequestOutput:
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]


class Detokenizer:
    """Turns tokens into text one by one; a character whose bytes are spread over tokens appears when it is complete."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._ids: list[int] = []
        self._start = self._read = 0  # decoded so far: [0, read); decoding begins at start, for context
        self.text = ""

    def push(self, token: int) -> None:
        self._ids.append(token)
        new = self._decode(len(self._ids))
        if not new.endswith("\ufffd"):
            self._accept(new)

    def flush(self) -> None:
        """Accept an incomplete character as it stands."""
        self._accept(self._decode(len(self._ids)))

    def _accept(self, new: str) -> None:
        self.text += new[len(self._decode(self._read)) :]
        self._start, self._read = self._read, len(self._ids)

    def _decode(self, end: int) -> str:
        return self._tokenizer.decode(self._ids[self._start : end], self._skip)


@dataclass
class Sequence:
    """One continuation in progress. ``computed`` tokens have their keys and values in the cache."""

    request: int
    index: int
    tokens: list[int]
    prompt_len: int
    limit: int  # tokens it may reach, prompt included
    params: SamplingParams
    detokenizer: Detokenizer
    seed: int
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    siblings: list[Sequence] = field(default_factory=list)  # share the prompt once it is computed
    logprobs: list[dict[int, float]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    def append(self, token: int, end_ids: tuple[int, ...]) -> None:
        """Take the next token and decide whether the sequence ends with it."""
        searched = len(self.detokenizer.text)
        self.tokens.append(token)
        self.detokenizer.push(token)
        params = self.params
        if self.generated >= params.min_tokens:
            if token in params.stop_token_ids or (token in end_ids and not params.ignore_eos):
                self.finish_reason, self.stop_reason = "stop", token
                self.detokenizer.flush()
                return
            for stop in params.stop:
                at = self.detokenizer.text.find(stop, max(0, searched - len(stop) + 1))
                if at >= 0:
                    self.detokenizer.text = self.detokenizer.text[:at]
                    self.finish_reason, self.stop_reason = "stop", stop
                    return
        if len(self.tokens) >= self.limit:
            self.finish_reason = "length"
            self.detokenizer.flush()

    def output(self) -> CompletionOutput:
        return CompletionOutput(
            self.index,
            self.detokenizer.text,
            tuple(self.tokens[self.prompt_len :]),
            self.finish_reason or "length",
            self.stop_reason,
            None if self.params.logprobs is None else tuple(self.logprobs),
        )


def draw_seed() -> int:
    return int.from_bytes(os.urandom(7), "little")


def as_prompt(prompt: Any) -> tuple[str | None, list[int] | None]:
    """(text, None) or (None, token ids) from a prompt in one of its accepted forms."""
    if isinstance(prompt, str):
        return prompt, None
    if isinstance(prompt, dict) and set(prompt) == {"prompt_token_ids"}:
        return None, [int(t) for t in prompt["prompt_token_ids"]]
    raise ValueError(f"prompt: expected a string or {{'prompt_token_ids': [...]}}, got {prompt!r:.200}")
