"""How a record becomes a sample: its pieces of text and the loss weight of each, conversations by their template.

Nothing is ever masked by token value (a pad id, say).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fastsft.config import DataOptions
from fastsft.data.records import Record
from fastsft.data.turns import Segment, lay_out, thinking_end
from fastsft.models.template import Span
from fastsft.models.tokenizer import Tokenizer

# prompt: encoded as at inference, where the text of a special token becomes that token.
# start: plain text at a document's beginning. inner: plain text that goes on where another piece ended.
Form = Literal["prompt", "start", "inner"]


@dataclass(frozen=True)
class Piece:
    """A text with its weight, or a token given by its id. Inside ``segments`` of the text, theirs counts instead."""

    content: str | int
    weight: float
    form: Form = "inner"
    segments: tuple[Segment, ...] = ()


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
    """A conversation before tokenisation: what the template wrote, and its segments; the rest has ``prompt_weight``."""

    text: str
    segments: tuple[Segment, ...]
    weight: float
    prompt_weight: float
    context: None = None  # nothing of it may be shortened
    shortened: bool = False


def draft(record: Record, tokenizer: Tokenizer, options: DataOptions) -> Draft | ChatDraft:
    """Lay out a record of kind messages, prompt_completion or text; FIM has its own module.

    Raises:
        TemplateError: the conversation cannot be rendered. UnfitError: its exact mask cannot be told.
        ValueError: the tokenizer has no end-of-text token.
    """
    weights = options.weights
    if record.kind == "messages":
        text, segments = lay_out(tokenizer, record.messages, record.tools, options)
        return ChatDraft(text, tuple(segments), record.weight, weights.prompt)
    start = [Piece(t, 0.0) for t in tokenizer.prefix_ids]
    end = Piece(end_id(tokenizer), weights.control)
    if record.kind == "prompt_completion":
        prompt, completion = record.parts
        thought = thinking_end(completion, 0, len(completion)) if weights.thinking != weights.answer else 0
        segments = [(0, thought, weights.thinking)] if thought else []
        # Two encodings: the prompt's tokens are then a prefix of the sample, exactly as at inference.
        answer = Piece(completion, weights.answer, "inner" if prompt else "start", tuple(segments))
        return Draft((*start, Piece(prompt, weights.prompt, "prompt"), answer, end), record.weight)
    return Draft((*start, Piece(record.parts[0], weights.answer, "start"), end), record.weight)


def end_id(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_id is None:
        raise ValueError("tokenizer: no eos_token in tokenizer_config.json, so a sample's end cannot be trained")
    return tokenizer.eos_id


def token_weights(offsets: Sequence[Span], segments: Sequence[Segment], outside: float) -> list[float]:
    """The weight of the first segment of which a token covers a character (transformers' rule), else ``outside``.

    ``segments`` and ``offsets`` ascend.
    """
    weights = []
    i = 0
    for begin, end in offsets:
        while i < len(segments) and segments[i][1] <= begin:
            i += 1
        inside = i < len(segments) and begin < segments[i][1] and end > segments[i][0]
        weights.append(segments[i][2] if inside else outside)
    return weights
