"""What a caller asks for and gets back, and a sequence's state in between."""

from __future__ import annotations

import math
import operator
import os
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from fastsft.models.control import RESERVED
from fastsft.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt; names as in vLLM.

    Attributes:
        n: continuations per prompt; continuation i draws with ``seed + i``.
        temperature: 0 takes the most probable token.
        top_k, top_p, min_p: restrict the draw; 0, 1.0 and 0.0 switch each off.
        seed: of the noise that the draws use, which does not depend on what else is in the batch (docs/engine.md says
            what may); None draws one.
        stop: strings that end the text and are not part of it.
        stop_token_ids: ids that end the text, besides the model's end tokens.
        ignore_eos: go on past the model's end tokens.
        max_tokens, min_tokens: limits on the number of generated tokens.
        logprobs: None, or the number of most probable tokens to report beside the chosen one; True means 0, False None.

    Raises:
        ValueError: a value of the wrong type or out of range; the message names it. (TypeError: an unknown name.)
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

        def integer(name: str, low: int, high: int, expected: str) -> None:
            value = getattr(self, name)
            whole = isinstance(value, Integral) and not isinstance(value, bool)
            check(whole and low <= value <= high, name, expected)

        def number(name: str, inside: bool, expected: str) -> None:
            check(inside and not isinstance(getattr(self, name), bool), name, expected)

        t, p, m = self.temperature, self.top_p, self.min_p
        number("temperature", isinstance(t, Real) and 0 <= t < math.inf, "a finite number >= 0")
        number("top_p", isinstance(p, Real) and 0 < p <= 1, "a number in (0, 1]")
        number("min_p", isinstance(m, Real) and 0 <= m <= 1, "a number in [0, 1]")
        integer("n", 1, 2**31 - 1, "an integer >= 1")
        integer("top_k", 0, 2**31 - 1, "an integer >= 0")
        integer("max_tokens", 1, 2**31 - 1, "an integer >= 1")
        integer("min_tokens", 0, self.max_tokens, f"an integer from 0 to max_tokens ({self.max_tokens})")
        if self.seed is not None:
            integer("seed", 0, 2**62 - 1, "None or an integer in [0, 2**62)")
        if isinstance(self.logprobs, bool):
            object.__setattr__(self, "logprobs", 0 if self.logprobs else None)
        if self.logprobs is not None:
            integer("logprobs", 0, 20, "None, a boolean or an integer from 0 to 20")
        for name in ("ignore_eos", "skip_special_tokens"):
            check(isinstance(getattr(self, name), bool), name, "True or False")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        strings = isinstance(self.stop, list | tuple) and all(isinstance(s, str) and s for s in self.stop)
        check(strings, "stop", "a non-empty string, or a list of them")
        ids = isinstance(self.stop_token_ids, list | tuple) and all(map(_is_id, self.stop_token_ids))
        check(ids, "stop_token_ids", "a list of token ids")
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))


@dataclass(frozen=True)
class CompletionOutput:
    """One continuation.

    ``token_ids`` holds every generated token, the one that ended it included; ``text`` excludes the end token and the
    stop string. ``logprobs``: per token, id -> log-probability under the unmodified distribution.
    """

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
        params = self.params
        self.tokens.append(token)
        may_stop = self.generated >= params.min_tokens
        ends = may_stop and (token in params.stop_token_ids or (token in end_ids and not params.ignore_eos))
        full = len(self.tokens) >= self.limit
        searched = len(self.detokenizer.text)
        if not ends:
            self.detokenizer.push(token)
        if ends or full:
            self.detokenizer.flush()  # before the search: what is held back may complete a stop string
        if may_stop and (stop := self._cut_at_stop(searched)):
            self.finish_reason, self.stop_reason = "stop", stop
        elif ends:
            self.finish_reason, self.stop_reason = "stop", token
        elif full:
            self.finish_reason = "length"

    def _cut_at_stop(self, searched: int) -> str | None:
        """Cut the text where a stop string was completed after ``searched`` characters.

        Of several, the one completed first wins and, of those, the longest: as if the text had come character by
        character, so that the result does not depend on how the tokenizer splits it.
        """
        text, found = self.detokenizer.text, []
        for stop in self.params.stop:
            at = text.find(stop, max(0, searched - len(stop) + 1))
            if at >= 0:
                found.append((at + len(stop), at, stop))
        if not found:
            return None
        _, at, stop = min(found)
        self.detokenizer.text = text[:at]
        return stop

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


def _is_id(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def as_prompt(prompt: Any) -> tuple[str | None, list[int] | None]:
    """(text, None) or (None, token ids) from a prompt in one of its accepted forms."""
    if isinstance(prompt, str):
        return prompt, None
    if isinstance(prompt, dict) and set(prompt) == {"prompt_token_ids"}:
        try:
            return None, [operator.index(t) for t in prompt["prompt_token_ids"]]
        except TypeError:
            pass  # not integers: the message below says so
    raise ValueError(f"prompt: expected a string or {{'prompt_token_ids': [integers]}}, got {prompt!r:.200}")


class PromptError(ValueError):
    """A prompt that cannot be continued.

    Attributes:
        number: its place in the list of prompts.
        problem: what was expected and what came.
    """

    def __init__(self, number: int, problem: str) -> None:
        super().__init__(f"generate: prompts[{number}]: {problem}")
        self.number, self.problem = number, problem


def text_problem(text: str) -> str | None:
    """Why no tokenizer can encode this, or ours would take it for the mark of a control token."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"expected text, got a lone surrogate at character {error.start}"
    if (found := RESERVED.search(text)) is not None:
        return f"expected text, got a noncharacter (U+FDD0 to U+FDD3) at character {found.start()}"
    return None
