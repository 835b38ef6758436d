"""What a caller asks for and gets back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from fastsft.engine.guide import StructuredOutputs

_LEAST, _MOST = 1e-30, 1e30
_MAX_STRINGS, _MAX_CHARACTERS = 256, 1024  # they are searched with every token


def _check_strings(name: str, strings: Sequence[str]) -> None:
    longest = max(map(len, strings), default=0)
    if len(strings) > _MAX_STRINGS or longest > _MAX_CHARACTERS:
        raise ValueError(
            f"SamplingParams: {name}: expected at most {_MAX_STRINGS} strings of at most {_MAX_CHARACTERS} characters, "
            f"got {len(strings)}, the longest of {longest}"
        )


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt; names as in vLLM.

    Attributes:
        n: continuations per prompt; continuation i draws with ``seed + i``.
        best_of: draw this many and return the ``n`` most probable ones, by the sum of their log-probabilities.
        temperature: 0 takes the most probable token.
        top_k, top_p, min_p: restrict the draw; 0 or -1, 1.0 and 0.0 switch each off.
        seed: of the noise that the draws use, which does not depend on what else is in the batch (docs/engine.md says
            what may); None draws one.
        stop: strings that end the text and are not part of it.
        stop_token_ids: ids that end the text, besides the model's end tokens.
        ignore_eos: go on past the model's end tokens.
        max_tokens, min_tokens: limits on the number of generated tokens.
        logprobs: None, or the number of most probable tokens to report beside the chosen one; True means 0, False None.
        prompt_logprobs: the same for the tokens of the prompt, all of which are then computed.
        skip_special_tokens: leave special tokens out of ``text``; ``token_ids`` has them all.
        repetition_penalty: above 1, tokens of the prompt and the text become less probable (CTRL, 1909.05858).
        presence_penalty, frequency_penalty: taken from the logits of tokens of the text, once and per occurrence.
        logit_bias: token id -> added to its logit, from -100 to 100.
        allowed_token_ids: draw among these alone.
        bad_words: strings whose tokens are not completed, at the text's start or inside.
        structured_outputs: a JSON schema, regular expression, grammar or list of choices that the text must match.

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
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    best_of: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | list[int] | None = None
    bad_words: tuple[str, ...] | list[str] = ()
    structured_outputs: StructuredOutputs | dict[str, Any] | None = None

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
        # What float32 holds, with room for a division of logits.
        in_range = isinstance(t, Real) and (t == 0 or _LEAST <= t <= _MOST)
        number("temperature", in_range, f"0, or a number from {_LEAST} to {_MOST}")
        number("top_p", isinstance(p, Real) and _LEAST <= p <= 1, f"a number from {_LEAST} to 1")
        number("min_p", isinstance(m, Real) and 0 <= m <= 1, "a number in [0, 1]")
        integer("n", 1, 2**31 - 1, "an integer >= 1")
        integer("top_k", -1, 2**31 - 1, "an integer >= -1")
        object.__setattr__(self, "top_k", max(0, self.top_k))
        integer("max_tokens", 1, 2**31 - 1, "an integer >= 1")
        integer("min_tokens", 0, self.max_tokens, f"an integer from 0 to max_tokens ({self.max_tokens})")
        if self.seed is not None:
            integer("seed", 0, 2**62 - 1, "None or an integer in [0, 2**62)")
        for name in ("logprobs", "prompt_logprobs"):
            if isinstance(value := getattr(self, name), bool):
                object.__setattr__(self, name, 0 if value else None)
            if getattr(self, name) is not None:
                integer(name, 0, 20, "None, a boolean or an integer from 0 to 20")
        if self.best_of is not None:
            integer("best_of", self.n, 2**31 - 1, f"None or an integer >= n ({self.n})")
        r = self.repetition_penalty
        number("repetition_penalty", isinstance(r, int | float) and 1e-3 <= r <= 1e3, "a number from 0.001 to 1000")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            number(name, isinstance(value, int | float) and -2 <= value <= 2, "a number from -2 to 2")
        if self.logit_bias is not None:
            bias = self.logit_bias
            right = isinstance(bias, dict) and all(
                _is_id(i) and isinstance(b, int | float) and -100 <= b <= 100 for i, b in bias.items()
            )
            check(right, "logit_bias", "token ids with numbers from -100 to 100")
        for name in ("ignore_eos", "skip_special_tokens"):
            check(isinstance(getattr(self, name), bool), name, "True or False")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        strings = isinstance(self.stop, list | tuple) and all(isinstance(s, str) and s for s in self.stop)
        check(strings, "stop", "a non-empty string, or a list of them")
        _check_strings("stop", self.stop)
        ids = isinstance(self.stop_token_ids, list | tuple) and all(map(_is_id, self.stop_token_ids))
        check(ids, "stop_token_ids", "a list of token ids")
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if self.allowed_token_ids is not None:
            allowed = self.allowed_token_ids
            some = isinstance(allowed, list | tuple) and len(allowed) > 0 and all(map(_is_id, allowed))
            check(some, "allowed_token_ids", "None or a non-empty list of token ids")
            object.__setattr__(self, "allowed_token_ids", tuple(allowed))
        words = isinstance(self.bad_words, list | tuple) and all(isinstance(w, str) and w for w in self.bad_words)
        check(words, "bad_words", "a list of non-empty strings")
        _check_strings("bad_words", self.bad_words)
        object.__setattr__(self, "bad_words", tuple(self.bad_words))
        if isinstance(self.structured_outputs, dict):
            known = {f.name for f in fields(StructuredOutputs)}
            check(
                known >= self.structured_outputs.keys(), "structured_outputs", f"keys among {', '.join(sorted(known))}"
            )
            object.__setattr__(self, "structured_outputs", StructuredOutputs(**self.structured_outputs))
        if self.structured_outputs is not None:
            guided = isinstance(self.structured_outputs, StructuredOutputs)
            check(guided, "structured_outputs", "None, StructuredOutputs or a dictionary of its fields")
            free = not self.ignore_eos and not self.min_tokens
            check(
                free, "structured_outputs", "neither ignore_eos nor min_tokens beside it (the text ends where it says)"
            )


@dataclass(frozen=True)
class CompletionOutput:
    """One continuation.

    ``token_ids`` holds every generated token, the one that ended it included; ``text`` excludes the end token and the
    stop string. ``logprobs``: per token, id -> log-probability under the unmodified distribution, and
    ``cumulative_logprob`` the sum of those of the tokens themselves.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str  # "stop", "length", or "error" where no token was allowed
    stop_reason: str | int | None  # the stop string or end token, if one ended it
    logprobs: tuple[dict[int, float], ...] | None = None
    weight_versions: tuple[int, ...] = (0,)
    """Of the weights that its tokens were drawn under, in order: several where they were replaced meanwhile."""
    cumulative_logprob: float = 0.0
    drafted_tokens: int = field(default=0, compare=False)
    """Guesses checked (speculative decoding), and how many of them were right: how it came about, not what it is."""
    accepted_tokens: int = field(default=0, compare=False)


@dataclass(frozen=True)
class RequestOutput:
    """What became of one prompt: ``outputs`` has its ``n`` continuations, ``prompt`` its text if it came as one."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    prompt_logprobs: tuple[dict[int, float] | None, ...] | None = None
    """Per token of the prompt; None for the first one, which nothing is before."""


@dataclass(frozen=True)
class Request:
    """A prompt to continue. ``priority``: lower ones go first, and those of one priority in order of arrival.

    ``adapter``: the name of one that the engine has; None: the model as it is.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    adapter: str | None = None


@dataclass(frozen=True)
class Update:
    """What one step added to a continuation.

    ``text`` is final: what a stop string could still take back comes later, at the latest with ``finish_reason``. So
    the texts of a continuation's updates, put together, are its text. ``logprobs`` are those of ``token_ids``.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[dict[int, float], ...] | None
    finish_reason: str | None
    stop_reason: str | int | None
    weight_version: int
    cumulative_logprob: float
    """Of all tokens of the continuation so far."""
    drafted_tokens: int = 0
    """Guesses checked so far (speculative decoding), and how many of them were right."""
    accepted_tokens: int = 0
    prompt_logprobs: tuple[dict[int, float] | None, ...] | None = None
    """In the first update of the first continuation, if they were asked for."""


class RequestError(ValueError):
    """A request that can never be served."""


class QueueFull(RuntimeError):
    """Too much is waiting; the same request may be accepted later."""


class PromptError(ValueError):
    """A prompt that cannot be continued.

    Attributes:
        number: its place in the list of prompts.
        problem: what was expected and what came.
    """

    def __init__(self, number: int, problem: str) -> None:
        super().__init__(f"generate: prompts[{number}]: {problem}")
        self.number, self.problem = number, problem


def _is_id(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
