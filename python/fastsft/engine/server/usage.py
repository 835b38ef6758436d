"""The ``usage`` of an answer."""

from __future__ import annotations

from typing import Any

from fastsft.engine.request import Update


class Usage:
    """Tokens of a request's prompts and continuations, and what became of guesses at them (speculative decoding), under
    the names that OpenAI's API has for predicted outputs. Wrong guesses are not counted as completion."""

    def __init__(self, prompt: int) -> None:
        self._prompt, self._generated = prompt, 0
        self._guesses: dict[tuple[str, int], tuple[int, int]] = {}  # of each continuation: checked, right

    def take(self, update: Update) -> None:
        self._generated += len(update.token_ids)
        if update.drafted_tokens:
            self._guesses[update.request_id, update.index] = update.drafted_tokens, update.accepted_tokens

    def shown(self) -> dict[str, Any]:
        prompt, generated = self._prompt, self._generated
        usage: dict[str, Any] = {
            "prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated,
        }  # fmt: skip
        if self._guesses:
            checked, right = (sum(counts) for counts in zip(*self._guesses.values(), strict=True))
            details = {"accepted_prediction_tokens": right, "rejected_prediction_tokens": checked - right}
            usage["completion_tokens_details"] = details
        return usage
