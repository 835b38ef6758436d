"""How a record becomes a sample: its pieces of text and the loss weight of each, conversations by their template.

Nothing is ever masked by token value (a pad id, say).
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastsft.data.records import Record
from fastsft.models.control import CONTROL
from fastsft.models.template import Span, TemplateError
from fastsft.models.tokenizer import Tokenizer

# What strftime_now tells a template: samples may not depend on the day they are made. (Llama 3's own default.)
_TODAY = datetime.datetime(2024, 7, 26)

# prompt: encoded as at inference, where the text of a special token becomes that token.
# start: plain text at a document's beginning. inner: plain text that goes on where another piece ended.
Form = Literal["prompt", "start", "inner"]


@dataclass(frozen=True)
class Piece:
    """One weight for a text, or for a token given by its id."""

    content: str | int
    weight: float
    form: Form = "inner"


@dataclass(frozen=True)
class Draft:
    """A sample before tokenisation: its pieces in order.

    ``context`` are the numbers of the pieces that may be shortened, of an infilling sample: prefix and suffix.
    """

    pieces: tuple[Piece, ...]
    weight: float = 1.0
    context: tuple[int, int] | None = None
    shortened: bool = False  # the document was too long and lost its end


@dataclass(frozen=True)
class ChatDraft:
    """A conversation before tokenisation: what the template wrote; weight 1 inside ``spans``."""

    text: str
    spans: tuple[Span, ...]
    weight: float
    prompt_weight: float


def draft(record: Record, tokenizer: Tokenizer, *, prompt_weight: float = 0.0) -> Draft | ChatDraft:
    """Lay out a record of kind messages, prompt_completion or text; FIM has its own module.

    Raises:
        TemplateError: the conversation cannot be rendered, or the assistant's part cannot be told exactly.
        ValueError: the tokenizer has no end-of-text token.
    """
    if record.kind == "messages":
        text, spans = assistant_spans(tokenizer, record.messages, record.tools)
        return ChatDraft(text, tuple(spans), record.weight, prompt_weight)
    start = [Piece(t, 0.0) for t in tokenizer.prefix_ids]
    end = Piece(end_id(tokenizer), 1.0)
    if record.kind == "prompt_completion":
        prompt, completion = record.parts
        # Two encodings: the prompt's tokens are then a prefix of the sample, exactly as at inference.
        answer = Piece(completion, 1.0, "inner" if prompt else "start")
        return Draft((*start, Piece(prompt, prompt_weight, "prompt"), answer, end), record.weight)
    return Draft((*start, Piece(record.parts[0], 1.0, "start"), end), record.weight)


def end_id(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_id is None:
        raise ValueError("tokenizer: no eos_token in tokenizer_config.json, so a sample's end cannot be trained")
    return tokenizer.eos_id


def assistant_spans(
    tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None
) -> tuple[str, list[Span]]:
    """The rendered conversation and the character ranges that the assistant wrote, end-of-turn marker included.

    From the template's ``{% generation %}`` tags where it has them. Otherwise by rendering prefixes: message i is what
    lies between the conversation before it, with the generation prompt, and the conversation up to and with it. Both
    must be literal prefixes of the whole, or the template is refused: there would be no exact answer.
    """

    def render(part: Sequence[dict[str, Any]], prompt: bool = False) -> tuple[str, list[Span]]:
        return tokenizer.render(part, add_generation_prompt=prompt, tools=tools, strftime_now=_TODAY.strftime)

    text, spans = render(messages)
    if tokenizer.marks_generation:
        return text, spans
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(messages[:i], prompt=True)[0]
        upto = render(messages[: i + 1])[0]
        if not (upto.startswith(before) and text.startswith(upto)):
            raise TemplateError(
                f"chat template: message {i} is rendered differently when more messages follow or when it is being "
                "generated; add {% generation %} tags to the template so that its tokens can be told exactly"
            )
        # What follows the end-of-turn marker (a newline, usually) is written by the template, not by the model.
        end = upto.rstrip()
        closed = any(end.endswith(CONTROL + name) for name in tokenizer.control.names)
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
