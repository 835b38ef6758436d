"""Texts, conversations and infills as prompts: token ids, as the model was trained on them."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable
from typing import Any, Literal

from fastsft.engine.request import PromptError, SamplingParams
from fastsft.models.control import RESERVED
from fastsft.models.fim import Fim
from fastsft.models.tokenizer import Tokenizer
from fastsft.ops.fim_rows import MIDDLE, PREFIX, SUFFIX


def encode_prompt(tokenizer: Tokenizer, prompt: Any, number: int = 0) -> tuple[str | None, list[int]]:
    """Text, if it is one, and ids of a text or of ``{"prompt_token_ids": [...]}``.

    Raises:
        PromptError: a text that no tokenizer can encode; ``number`` is its place. ValueError: another kind of prompt.
    """
    text, ids = as_prompt(prompt)
    if ids is None:
        if (problem := text_problem(text or "")) is not None:
            raise PromptError(number, problem)
        ids = [*tokenizer.prefix_ids, *tokenizer.encode(text or "")]
        if ids[:2] == [tokenizer.bos_id] * 2:  # the text, from a chat template, brought its own
            ids = ids[1:]
    return text, ids


def encode_chat(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], number: int = 0, **template: Any
) -> tuple[str, list[int]]:
    """Text and ids of a conversation with the generation prompt; raises as :func:`encode_prompt` does."""
    template["add_generation_prompt"] = True
    text = tokenizer.render_chat(messages, **template)
    if (problem := text_problem(text)) is not None:
        raise PromptError(number, problem)
    # The template writes every special token, as in training: nothing is put before it.
    return text, tokenizer.encode_chat(messages, **template)


def encode_infill(
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str,
    *,
    order: Literal["psm", "spm"] = "psm",
    format: str = "auto",
    markers: tuple[str, ...] = (),
) -> tuple[list[int], tuple[int, ...]]:
    """Ids of the prompt, and those that end the answer besides the model's end tokens. See :meth:`LLM.infill`.

    Raises:
        ValueError: no format or several fit, a token of it is not one of this model, the text cannot be encoded, or
            another ``order``.
    """
    if order not in ("psm", "spm"):
        raise ValueError(f"infill: order: expected 'psm' or 'spm', got {order!r}")
    try:
        fim = Fim.find(tokenizer, format, markers)
    except ValueError as error:
        raise ValueError(f"infill: {error}") from None
    for name, text in (("prefix", prefix), ("suffix", suffix)):
        if (problem := text_problem(text)) is not None:
            raise ValueError(f"infill: {name}: {problem}")
    (before,) = tokenizer.encode_text([prefix])
    (after,) = tokenizer.encode_text([suffix], continues=True)
    texts = {PREFIX: before, SUFFIX: after, MIDDLE: []}
    layout = fim.layout(order == "spm")
    prompt = [*tokenizer.prefix_ids, *(i for item in layout for i in (texts[item] if item < 0 else [item]))]
    return prompt, fim.stop_ids


def ending_with(params: SamplingParams, ends: Iterable[int]) -> SamplingParams:
    """The tokens of an infill's format end it, besides the model's own."""
    if params.ignore_eos:
        return params
    return dataclasses.replace(params, stop_token_ids=(*params.stop_token_ids, *ends))


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


def text_problem(text: str) -> str | None:
    """Why no tokenizer can encode this, or ours would take it for the mark of a control token."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"expected text, got a lone surrogate at character {error.start}"
    if (found := RESERVED.search(text)) is not None:
        return f"expected text, got a noncharacter (U+FDD0 to U+FDD3) at character {found.start()}"
    return None
