"""How a record becomes a sample: its pieces of text and the segment of each, conversations by their template.

Nothing is ever masked by token value (a pad id, say).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastsft.config import DataOptions, WeightOptions
from fastsft.data.records import Record
from fastsft.data.segments import Range, Segment
from fastsft.data.turns import lay_out, thinking_end
from fastsft.models.tokenizer import Tokenizer

# prompt: encoded as at inference, where the text of a special token becomes that token.
# start: plain text at a document's beginning. inner: plain text that goes on where another piece ended.
Form = Literal["prompt", "start", "inner"]


@dataclass(frozen=True)
class Piece:
    """A text, or a token given by its id, and the segment that it is, other than within ``ranges`` of the text.

    ``weight`` multiplies that of its segment.
    """

    content: str | int
    segment: Segment
    form: Form = "inner"
    ranges: tuple[Range, ...] = ()
    weight: float = 1.0


@dataclass(frozen=True)
class Draft:
    """A sample before tokenisation: its pieces in order, the weights of their segments and its own.

    ``context`` are the numbers of the pieces that may be shortened, of an infilling sample: prefix and suffix.
    """

    pieces: tuple[Piece, ...]
    weights: WeightOptions
    weight: float = 1.0
    context: tuple[int, int] | None = None
    shortened: bool = False  # the document was too long and lost its end


@dataclass(frozen=True)
class ChatDraft:
    """A conversation before tokenisation: what the template wrote; outside of ``ranges`` it is prompt."""

    text: str
    ranges: tuple[Range, ...]
    weights: WeightOptions
    weight: float
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
        text, ranges = lay_out(tokenizer, record.messages, record.tools, options)
        return ChatDraft(text, tuple(ranges), weights, record.weight)
    start = head(tokenizer)
    end = Piece(end_id(tokenizer), Segment.CONTROL)
    if record.kind == "prompt_completion":
        prompt, completion = record.parts
        thought = thinking_end(completion, 0, len(completion))
        block = (Range(0, thought, Segment.THINKING),) if thought else ()
        # Two encodings: the prompt's tokens are then a prefix of the sample, exactly as at inference.
        answer = Piece(completion, Segment.ANSWER, "inner" if prompt else "start", block)
        return Draft((*start, Piece(prompt, Segment.PROMPT, "prompt"), answer, end), weights, record.weight)
    return Draft((*start, Piece(record.parts[0], Segment.ANSWER, "start"), end), weights, record.weight)


def head(tokenizer: Tokenizer) -> list[Piece]:
    """What the tokenizer itself puts before every text, which is never trained."""
    return [Piece(token, Segment.PROMPT, weight=0.0) for token in tokenizer.prefix_ids]


def end_id(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_id is None:
        raise ValueError("tokenizer: no eos_token in tokenizer_config.json, so a sample's end cannot be trained")
    return tokenizer.eos_id
