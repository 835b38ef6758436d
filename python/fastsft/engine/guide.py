"""Guided output: which tokens may come next under a JSON schema, a regular expression or a grammar.

llguidance compiles and parses; here are what a request says and how a draw asks. A guide is told each token that its
text gets, and answers for the rows of drafts by going ahead and back.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from fastsft.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class StructuredOutputs:
    """What the text must be; exactly one is given.

    Attributes:
        json: a JSON schema, as a dictionary or as its text.
        regex: a regular expression that the whole text matches (syntax of Rust's ``regex``).
        choice: one of these strings.
        grammar: a context-free grammar, in Lark's or llama.cpp's (GBNF) notation.

    Raises:
        ValueError: none or several, or one of the wrong type.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: tuple[str, ...] | list[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if getattr(self, f.name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"StructuredOutputs: expected one of json, regex, choice, grammar, got {', '.join(given) or 'none'}"
            )
        name, value = given[0], getattr(self, given[0])
        if name == "choice":
            right = isinstance(value, list | tuple) and value and all(isinstance(c, str) and c for c in value)
            expected = "a list of non-empty strings"
        else:
            right = isinstance(value, str | dict) if name == "json" else isinstance(value, str)
            expected = "a schema as a dictionary or a string" if name == "json" else "a string"
        if not right:
            raise ValueError(f"StructuredOutputs: {name}: expected {expected}, got {value!r:.200}")

    def format_and_text(self) -> tuple[Literal["json_schema", "choice", "regex", "grammar"], str]:
        if self.json is not None:
            return "json_schema", self.json if isinstance(self.json, str) else json.dumps(self.json)
        if self.choice is not None:
            return "choice", json.dumps(list(self.choice))
        return ("regex", self.regex) if self.regex is not None else ("grammar", self.grammar or "")


class Guides:
    """Compiles what requests ask for, for one tokenizer.

    Args:
        end_ids: tokens that end a text, allowed where the text is complete.

    Raises:
        ImportError: llguidance is not installed. ValueError: no end tokens, without which no text could be complete.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise ImportError("structured_outputs: needs llguidance: pip install 'fastsft[guided]'") from error
        if not end_ids:
            raise ValueError("params: structured_outputs: needs a model with an end token")
        self._library = llguidance
        self._vocab_size = vocab_size
        self._vocabulary = llguidance.LLTokenizer(
            tokenizer.backend.to_str(), n_vocab=vocab_size, eos_token=list(end_ids)
        )
        self._grammars: dict[tuple[str, str], Any] = {}
        self._lock = threading.Lock()  # of the dictionary: what compiles must not keep others waiting

    def guide(self, asked: StructuredOutputs) -> Guide:
        """At the start of a text. Several threads may ask.

        Raises:
            ValueError: a schema, expression or grammar that cannot be compiled; the message says why.
        """
        key = asked.format_and_text()
        matcher = self._grammars.get(key)
        if matcher is None:
            try:
                grammar = self._library.grammar_from(*key)
            except ValueError as error:
                raise ValueError(_wrong(key[0], str(error))) from None
            matcher = self._library.LLMatcher(self._vocabulary, grammar, log_level=0)
            if matcher.is_error():
                raise ValueError(_wrong(key[0], matcher.get_error()))
            matcher.compute_bitmask()  # builds what all copies share, which may take seconds
            with self._lock:
                if len(self._grammars) >= 64:  # a server sees schemas without end
                    self._grammars.pop(next(iter(self._grammars)))
                self._grammars[key] = matcher
        return Guide(matcher.deep_copy(), self._vocab_size)


class Guide:
    """The state of one text."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def follow(self, token: int) -> bool:
        """Take the text's next token, one that was allowed; False: the guide has come to the library's own limits."""
        return bool(self._matcher.consume_token(token))

    def allowed(self, draft: Iterable[int]) -> list[torch.Tensor]:
        """bool [V] for the next token, then for the one after each token of ``draft`` that is allowed itself."""
        masks, ahead = [self._mask()], 0
        for token in draft:
            if self._matcher.try_consume_tokens([token]) == 0:
                break
            ahead += 1
            masks.append(self._mask())
        self._matcher.rollback(ahead)
        return masks

    def _mask(self) -> torch.Tensor:
        packed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
        return bits.flatten()[: self._vocab_size].bool()


def _wrong(kind: str, message: str) -> str:
    """Without the addresses that stand behind some of the library's messages."""
    return f"params: structured_outputs: {kind}: {message.partition('<backtrace>')[0].strip()}"
