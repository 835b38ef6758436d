"""Tokens into text, one by one."""

from __future__ import annotations

from collections.abc import Iterable

from fastsft.models.tokenizer import Tokenizer


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

    def restart(self, tokens: Iterable[int]) -> None:
        """As if these alone had been pushed."""
        self._ids, self._start, self._read, self.text = [], 0, 0, ""
        for token in tokens:
            self.push(token)

    def flush(self) -> None:
        """Accept an incomplete character as it stands."""
        self._accept(self._decode(len(self._ids)))

    def _accept(self, new: str) -> None:
        self.text += new[len(self._decode(self._read)) :]
        self._start, self._read = self._read, len(self._ids)

    def _decode(self, end: int) -> str:
        return self._tokenizer.decode(self._ids[self._start : end], self._skip)
