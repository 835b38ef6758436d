"""Tokens one by one as text and bytes, and log-probabilities in OpenAI's two forms."""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Sequence
from typing import Any

from fastsft.models.tokenizer import Tokenizer
from fastsft.ops.bpe import bytes_of_letters

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's name of a byte


class Pieces:
    """What single tokens say. A token that is only a part of a character has bytes, and no text of its own."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.backend.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special)
        self.piece = functools.lru_cache(maxsize=1 << 16)(self._piece)

    def _piece(self, token: int) -> tuple[str, bytes]:
        """Text and bytes; the text of a part of a character is ``bytes:\\xe2\\x82``, as OpenAI writes it."""
        text = self._tokenizer.decode_inside([token], skip_special_tokens=False)
        if "\ufffd" not in text:
            return text, text.encode()
        name = self._tokenizer.backend.id_to_token(token) or ""
        if byte := _BYTE.fullmatch(name):
            raw = bytes([int(byte[1], 16)])
        else:
            try:
                raw = name.translate(bytes_of_letters()).encode("latin-1")
            except UnicodeEncodeError:
                raw = text.encode()  # no byte-level vocabulary: the token says U+FFFD itself
        try:
            return raw.decode(), raw
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in raw), raw

    def in_text(self, token: int, skip_special_tokens: bool) -> bytes:
        """What a token adds to a text."""
        return b"" if skip_special_tokens and token in self._special else self.piece(token)[1]

    def completion_logprobs(
        self, tokens: Sequence[int], each: Sequence[dict[int, float] | None], count: int, offsets: Sequence[int]
    ) -> dict[str, Any]:
        """Of the older API: four lists of one length.

        Args:
            each: per token, id -> log-probability, its own among them; None for a text's first token.
            count: how many of the most probable ones were asked for. The token's own stands beside them.
            offsets: where each token begins in the text, see :class:`Offsets`.
        """
        top = [shown and self._by_text(_most_probable(shown, len(shown))) for shown in each]
        return {
            "tokens": [self.piece(t)[0] for t in tokens],
            "token_logprobs": [None if shown is None else shown[t] for t, shown in zip(tokens, each, strict=True)],
            "top_logprobs": top if count else None,
            "text_offset": list(offsets),
        }

    def _by_text(self, shown: list[tuple[int, float]]) -> dict[str, float]:
        """Of two tokens with the same text the more probable one counts."""
        found: dict[str, float] = {}
        for token, logprob in shown:
            found.setdefault(self.piece(token)[0], logprob)
        return found

    def chat_logprobs(self, tokens: Sequence[int], each: Sequence[dict[int, float]], count: int) -> dict[str, Any]:
        """Of the newer API: one entry per token."""
        content = [
            {**self._entry(token, shown[token]),
             "top_logprobs": [self._entry(*one) for one in _most_probable(shown, count)]}
            for token, shown in zip(tokens, each, strict=True)
        ]  # fmt: skip
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text, raw = self.piece(token)
        return {"token": text, "logprob": logprob, "bytes": list(raw)}


class Offsets:
    """Where tokens begin in the text that they make, in characters. A part of a character begins where that does."""

    def __init__(self, begin: int = 0) -> None:
        self.end = begin
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, raw: bytes) -> int:
        """Of a token that adds these bytes."""
        if raw and raw[0] & 0xC0 != 0x80:  # whatever was begun stays as it is
            self.end += len(self._decoder.decode(b"", True))
        begin = self.end
        self.end += len(self._decoder.decode(raw))
        return begin


def _most_probable(shown: dict[int, float], count: int) -> list[tuple[int, float]]:
    """The chosen token stands beside them, and is one of them only if it is that probable."""
    return sorted(shown.items(), key=lambda item: -item[1])[:count]
