"""From a record to token ids with one loss weight per token. Nothing is ever masked by token value (a pad id, say)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastsft.data.records import Record
from fastsft.models.tokenizer import TemplateError, Tokenizer

Span = tuple[int, int]  # half-open range of characters


@dataclass(frozen=True)
class Draft:
    """A sample before tokenisation: pieces encoded one by one (an int is a token id), each with its weight.

    A conversation is a single piece with ``spans`` of weight 1 inside it.
    """

    pieces: tuple[tuple[str | int, float], ...]
    spans: tuple[Span, ...] | None = None
    weight: float = 1.0
    prompt_weight: float = 0.0


def draft(record: Record, tokenizer: Tokenizer, *, prompt_weight: float = 0.0) -> Draft:
    """Lay out a record of kind messages, prompt_completion or text; FIM has its own module.

    Raises:
        TemplateError: the conversation cannot be rendered, or the assistant's part cannot be told exactly.
        ValueError: the tokenizer has no end-of-text token.
    """
    if record.kind == "messages":
        text, spans = assistant_spans(tokenizer, record.messages)
        return Draft(((text, 1.0),), tuple(spans), record.weight, prompt_weight)
    start: list[tuple[str | int, float]] = [(t, 0.0) for t in tokenizer.prefix_ids]
    end: list[tuple[str | int, float]] = [(end_id(tokenizer), 1.0)]
    if record.kind == "prompt_completion":
        prompt, completion = record.parts
        # Two encodings: the prompt's tokens are then a prefix of the sample, exactly as at inference.
        return Draft((*start, (prompt, prompt_weight), (completion, 1.0), *end), None, record.weight)
    return Draft((*start, (record.parts[0], 1.0), *end), None, record.weight)


def end_id(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_id is None:
        raise ValueError("tokenizer: no eos_token in tokenizer_config.json, so a sample's end cannot be trained")
    return tokenizer.eos_id


def assistant_spans(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]]) -> tuple[str, list[Span]]:
    """The rendered conversation and the character ranges that the assistant wrote, end-of-turn marker included.

    From the template's ``{% generation %}`` tags where it has them. Otherwise by rendering prefixes: message i is what
    lies between the conversation before it, with the generation prompt, and the conversation up to and with it. Both
    must be literal prefixes of the whole, or the template is refused: there would be no exact answer.
    """
    text, spans = tokenizer.render_chat_with_spans(messages)
    if tokenizer.marks_generation:
        return text, spans
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.render_chat(messages[:i], add_generation_prompt=True)
        upto = tokenizer.render_chat(messages[: i + 1])
        if not (upto.startswith(before) and text.startswith(upto)):
            raise TemplateError(
                f"chat template: message {i} is rendered differently when more messages follow or when it is being "
                "generated; add {% generation %} tags to the template so that its tokens can be told exactly"
            )
        # What follows the end-of-turn marker (a newline, usually) is written by the template, not by the model.
        end = upto.rstrip()
        closed = any(end.endswith(token) for token in tokenizer.special_tokens)
        spans.append((len(before), len(end) if closed else len(upto)))
    return text, spans


def token_weights(offsets: Sequence[Span], spans: Sequence[Span], prompt_weight: float) -> list[float]:
    """Weight 1 for a token that covers any character of a span (transformers' rule), else ``prompt_weight``.

    ``spans`` and ``offsets`` ascend.
    """
    weights = []
    i = 0
    for begin, end in offsets:
        while i < len(spans) and spans[i][1] <= begin:
            i += 1
        inside = i < len(spans) and begin < spans[i][1] and end > spans[i][0]
        weights.append(1.0 if inside else prompt_weight)
    return weights
