"""Tokens into text, one by one."""

from __future__ import annotations

from collections.abc import Iterable

from fastsft.models.tokenizer import Tokenizer

_BYTES = 4  # of a character, and so at most as many tokens
_MOST_HELD = 2 * _BYTES


class Detokenizer:
    """Turns tokens into text one by one; a character whose bytes are spread over tokens appears when it is complete.

    Args:
        continues: there is text before the tokens, so that none of them begins one: SentencePiece's vocabularies leave
            out a text's first space.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, *, continues: bool = False) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._continues = continues
        self.restart()

    def restart(self, tokens: Iterable[int] = ()) -> None:
        """As if these alone had been pushed."""
        self._ids: list[int] = []
        self._start = self._read = 0  # decoded so far: [0, read); decoding begins at start, for context
        self.text = ""
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        self._ids.append(token)
        new = self._decode(self._start, len(self._ids))
        if not new.endswith("\ufffd"):
            self._accept(new, len(self._ids))
        elif len(self._ids) - self._read > _MOST_HELD:
            self._accept_complete(new)

    def flush(self) -> None:
        """Accept an incomplete character as it stands."""
        self._accept(self._decode(self._start, len(self._ids)), len(self._ids))

    def _accept_complete(self, new: str) -> None:
        """Of bytes that are no text, all up to a place that no character goes over: what follows cannot change them."""
        end = len(self._ids)
        for cut in range(end - 1, end - 1 - _BYTES, -1):
            before = self._decode(self._start, cut)
            if before + self._decode(cut, end) == new:
                self._accept(before, cut)
                return

    def _accept(self, new: str, end: int) -> None:
        self.text += new[len(self._decode(self._start, self._read)) :]
        self._start, self._read = self._read, end

    def _decode(self, begin: int, end: int) -> str:
        decode = self._tokenizer.decode_inside if begin or self._continues else self._tokenizer.decode
        return decode(self._ids[begin:end], self._skip)
