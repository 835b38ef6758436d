"""Control tokens (``<s>``, ``<|im_end|>``, ...): told from text that merely looks like one.

A tokenizer turns the *text* of a special token into the token wherever it finds it, so that a source file with
``"<|im_end|>"`` in a string would end a turn. Here a control token is one only behind a mark: :func:`marking` rebuilds
a tokenizer with each of them renamed to mark + name, and then everything that is not marked is plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

# Noncharacters, which Unicode sets aside for a program's own use.
BEGIN, END = "\ufdd0", "\ufdd1"  # around what the assistant wrote, in a rendered conversation
LITERAL = "\ufdd2"  # before a control token's text in the content of a message, while its template runs
CONTROL = "\ufdd3"  # before a control token that is meant
RESERVED = re.compile(f"[{BEGIN}-{CONTROL}]")

# Some models do not declare theirs as special (the fill-in-the-middle markers of Qwen2.5 and DeepSeek-Coder).
_WRITTEN_LIKE_ONE = re.compile(r"<[|｜].+[|｜]>")  # noqa: RUF001


class ControlTokens:
    """The control tokens of a tokenizer, and where texts hold them."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        added = backend.get_added_tokens_decoder().values()
        self.names = tuple(t.content for t in added if t.special or _WRITTEN_LIKE_ONE.fullmatch(t.content))
        longest_first = sorted(self.names, key=len, reverse=True)
        either = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._name = re.compile(either)
        self.marked = re.compile(f"{CONTROL}(?:{either})")  # in a rendered conversation
        self._written = re.compile(f"{LITERAL}(?:{either})?|{either}")

    def first_in(self, text: str) -> str | None:
        found = self._name.search(text)
        return found and found[0]

    def escape(self, text: str) -> str:
        """Content on its way into a template, with LITERAL before each control token's text."""
        return self._name.sub(lambda found: LITERAL + found[0], text)

    def mark(self, rendered: str) -> str:
        """A template's output, with CONTROL before what the template wrote and nothing before what was content."""
        return self._written.sub(lambda found: found[0][1:] if found[0][0] == LITERAL else CONTROL + found[0], rendered)


def marking(backend: tokenizers.Tokenizer, names: Iterable[str]) -> tokenizers.Tokenizer:
    """The same tokenizer, which takes a control token only behind CONTROL.

    Raises:
        ValueError: it cannot be rebuilt with the same ids.
    """
    renamed = {name: CONTROL + name for name in names}
    spec = json.loads(backend.to_str())
    for token in spec["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
    # In the model's own vocabulary too: some algorithms take a whole word, or any piece, that they find there.
    model = spec["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {renamed.get(piece, piece): number for piece, number in vocab.items()}
    else:
        model["vocab"] = [[renamed.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
    rebuilt = _build(spec)
    for name, marked in renamed.items():
        if rebuilt.token_to_id(marked) != backend.token_to_id(name):
            raise ValueError(
                f"tokenizer: {name!r} cannot be told from text: it does not keep its id under another name"
            )
    return rebuilt


def continuing(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer for a text that goes on where another ended: without the space that SentencePiece puts first.

    Raises:
        ValueError: the tokenizer cannot be made to do so exactly.
    """
    before = json.loads(backend.to_str())
    spec = {**before, **{k: _without_first_space(before[k]) for k in ("normalizer", "pre_tokenizer")}}
    if spec == before:
        return backend
    rebuilt = _build(spec)
    for first, second in (("a", "b"), ("a", " b")):
        parts = [*_ids(backend, first), *_ids(rebuilt, second)]
        if (found := backend.decode(parts)) != backend.decode(_ids(backend, first + second)):
            raise ValueError(f"tokenizer: cannot encode a text in parts: {first!r} and {second!r} became {found!r}")
    return rebuilt


def _without_first_space(node: Any) -> Any:
    """A normaliser or pre-tokeniser less what it puts before a text."""
    kind = node["type"] if node else None
    if kind == "Prepend":
        return None
    if kind == "Metaspace":
        return {**node, "prepend_scheme": "never"}
    if kind == "ByteLevel":
        return {**node, "add_prefix_space": False}
    if kind == "Sequence":
        ((key, steps),) = ((k, v) for k, v in node.items() if k != "type")
        return {**node, key: [kept for step in steps if (kept := _without_first_space(step))]}
    return node


def _ids(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    return ids


def _build(spec: dict[str, Any]) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"tokenizer: special tokens cannot be told from text: {error}") from error
