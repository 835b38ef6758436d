"""Which characters of a conversation the model wrote, and as what: thinking, answer, tool calls, control tokens.

A conversation is rendered by its template; everything here works on the template's text, never on token ids.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from fastsft.config import DataOptions
from fastsft.data.records import MAX_WEIGHT, REASONING, is_weight
from fastsft.data.segments import Range, Segment
from fastsft.models.control import CONTROL
from fastsft.models.template import Span, TemplateError
from fastsft.models.tokenizer import Tokenizer

Message = dict[str, Any]
Render = Callable[..., tuple[str, list[Span]]]  # of messages and, maybe, with the generation prompt

# What strftime_now tells a template: samples may not depend on the day they are made. (Llama 3's own default.)
_TODAY = datetime.datetime(2024, 7, 26)

_OPEN = re.compile(f"\\s*{CONTROL}?<think>")
_OPENED = re.compile(f"{CONTROL}?<think>\\s*$")  # by the generation prompt
_CLOSE = re.compile(f"{CONTROL}?</think>")
# What is rendered in the place of a turn's content and its calls' names, to see where a template writes them.
_CONTENT, _NAME = "zqcontentzq", "zqnamezq"
_BLOCK = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


class UnfitError(ValueError):
    """A conversation without an exact mask; ``reason`` is what it is counted as."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def expand(messages: tuple[Message, ...], options: DataOptions) -> list[tuple[Message, ...]]:
    """The conversations that a row becomes samples of, by ``data.turns`` and ``data.thinking``."""
    if options.thinking != "keep":
        messages = tuple(map(without_reasoning, messages))
    ends = [i + 1 for i, message in enumerate(messages) if message["role"] == "assistant"]
    if options.turns == "all" or not ends:
        return [messages]
    return [messages[:end] for end in (ends if options.turns == "each" else ends[-1:])]


def without_reasoning(message: Message) -> Message:
    """The message less its reasoning, be it a field or a block at the beginning of its content."""
    if message["role"] != "assistant":
        return message
    kept = {name: value for name, value in message.items() if name not in REASONING}
    if isinstance(kept.get("content"), str):
        kept["content"] = _BLOCK.sub("", kept["content"], count=1) if _BLOCK.match(kept["content"]) else kept["content"]
    return kept


def turn_weight(message: Message) -> float:
    """A message's own weight, from its ``weight`` or ``train``; 1 where it has neither."""
    weight, train = message.get("weight"), message.get("train")
    if weight is not None and train is not None:
        raise UnfitError("bad weight", "a message has weight or train, not both")
    if train is not None and not isinstance(train, bool):
        raise UnfitError("bad weight", f"a message's train: expected true or false, got {train!r}")
    if weight is not None and not is_weight(weight):
        raise UnfitError(
            "bad weight", f"a message's weight: expected a number from 0 to {MAX_WEIGHT:g}, got {weight!r:.80}"
        )
    if message["role"] != "assistant" and (train or weight):
        raise UnfitError("bad weight", f"a message of the {message['role']}: only what the assistant wrote is trained")
    return float(train if train is not None else 1.0 if weight is None else weight)


def lay_out(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, options: DataOptions
) -> tuple[str, list[Range]]:
    """The rendered conversation and what the assistant wrote in it, ascending. The rest is prompt.

    Raises:
        TemplateError: the template refused the conversation.
        UnfitError: what the assistant wrote cannot be told exactly, or the template lost some of it.
    """
    last_only, non_thinking = options.turns != "all", options.thinking == "empty"
    text, turns = assistant_turns(tokenizer, messages, tools, last_only=last_only, non_thinking=non_thinking)
    render = _renderer(tokenizer, tools, non_thinking)
    _check_contents(text, messages)
    _check_names(tools, text, "tools")
    weights = {i: turn_weight(m) for i, m in enumerate(messages)}
    written = [w for i, w in weights.items() if messages[i]["role"] == "assistant"]
    plain = len({options.weights.thinking, options.weights.answer, options.weights.tool_calls}) == 1
    apart = options.weights.answer != options.weights.tool_calls
    ranges: list[Range] = []
    for span, number in turns:
        if number is None:
            if not plain or len(set(written)) > 1:
                raise UnfitError("turns cannot be told", "the template's {% generation %} tags are not one per message")
            weight, message = written[0] if written else 1.0, None
        else:
            weight, message = weights[number], messages[number]
            if weight > 0:
                _check_reasoning(text, span, message)
                _check_names(message.get("tool_calls"), text[slice(*span)], f"tool_calls of message {number}")
        calls = span[1]
        if number is not None and messages[number].get("tool_calls"):
            try:
                calls = _content_end(text, span, messages, number, render)
            except (UnfitError, TemplateError):
                if apart:
                    raise
                # Of one weight with the answer: the row is usable, and all of the turn counts as answer.
        ranges += [part._replace(weight=weight) for part in _parts(text, span, message, calls, tokenizer)]
    return text, ranges


def assistant_turns(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None = None,
    *,
    last_only: bool = False,
    non_thinking: bool = False,
) -> tuple[str, list[tuple[Span, int | None]]]:
    """The rendered conversation and, of each turn of the assistant's, its characters and the number of its message.

    The end-of-turn marker is part of the turn. From the template's ``{% generation %}`` tags where it has them; the
    number is None where these are not one per message. Otherwise by rendering prefixes: message i is what lies between
    the conversation before it, with the generation prompt, and the conversation up to and with it. Both must be literal
    prefixes of the whole, or the template is refused: there would be no exact answer.

    Args:
        last_only: only the last turn, with which the conversation must end.
        non_thinking: the template's own non-thinking mode, ``enable_thinking = false``.
    """
    render = _renderer(tokenizer, tools, non_thinking)
    text, tagged = render(messages)
    numbers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if tokenizer.marks_generation:
        if len(tagged) == len(numbers):
            pairs: list[tuple[Span, int | None]] = list(zip(tagged, numbers, strict=True))
            return text, pairs[-1:] if last_only else pairs
        if last_only:
            raise UnfitError("turns cannot be told", "the template's {% generation %} tags are not one per message")
        return text, [(span, None) for span in tagged]
    turns: list[tuple[Span, int | None]] = []
    for i in numbers[-1:] if last_only else numbers:
        before = render(messages[:i], prompt=True)[0]
        upto = render(messages[: i + 1])[0]
        if not (upto.startswith(before) and text.startswith(upto)):
            raise UnfitError(
                "prompt is not a prefix",
                f"chat template: message {i} is rendered differently when more messages follow or when it is being "
                "generated; add {% generation %} tags to the template so that its tokens can be told exactly, or make "
                "each turn a sample of its own (data.turns = 'each')",
            )
        # What follows the end-of-turn marker (a newline, usually) is written by the template, not by the model.
        end = upto.rstrip()
        closed = any(end.endswith(CONTROL + name) for name in tokenizer.control.names)
        turns.append(((len(before), len(end) if closed else len(upto)), i))
    return text, turns


def _renderer(tokenizer: Tokenizer, tools: Sequence[dict[str, Any]] | None, non_thinking: bool) -> Render:
    if non_thinking and "enable_thinking" not in (tokenizer.chat_template or ""):
        raise TemplateError("chat template: it has no non-thinking mode (it does not read enable_thinking)")
    mode = {"enable_thinking": False} if non_thinking else {}

    def render(part: Sequence[Message], prompt: bool = False) -> tuple[str, list[Span]]:
        return tokenizer.render(part, add_generation_prompt=prompt, tools=tools, strftime_now=_TODAY.strftime, **mode)

    return render


def thinking_end(text: str, begin: int, end: int) -> int:
    """Where the ``<think>`` block with which a turn begins is over; ``begin`` if there is none."""
    if not (_OPEN.match(text, begin, end) or _OPENED.search(text[max(0, begin - 64) : begin])):
        return begin
    close = _CLOSE.search(text, begin, end)
    return close.end() if close else end


def _parts(text: str, span: Span, message: Message | None, calls: int, tokenizer: Tokenizer) -> list[Range]:
    """A turn in parts of one segment each; neighbours of the same are one. Its tool calls begin at ``calls``, or
    behind its thinking if that is later."""
    begin, end = span
    thought = thinking_end(text, begin, end)
    first = begin
    reasoning = _reasoning(message)
    if thought == begin and reasoning and (at := text.find(reasoning, begin, end)) >= 0:  # in the template's own marks
        first, thought = at, at + len(reasoning)
    calls = max(calls, thought)
    parts = [
        Range(begin, first, Segment.ANSWER), Range(first, thought, Segment.THINKING),
        Range(thought, calls, Segment.ANSWER), Range(calls, end, Segment.TOOL_CALLS),
    ]  # fmt: skip
    marks = [(m.start(), m.end()) for m in tokenizer.control.marked.finditer(text, begin, end)]
    found: list[Range] = []

    def add(a: int, b: int, segment: Segment) -> None:
        if found and found[-1].end == a and found[-1].segment == segment:
            found[-1] = found[-1]._replace(end=b)
        elif a < b:
            found.append(Range(a, b, segment))

    for a, b, segment, _ in parts:
        for mark_begin, mark_end in marks:
            if a <= mark_begin < b:
                add(a, mark_begin, segment)
                add(mark_begin, mark_end, Segment.CONTROL)
                a = mark_end
        add(a, b, segment)
    return found


def _content_end(text: str, span: Span, messages: Sequence[Message], number: int, render: Render) -> int:
    """Where the content of a turn with tool calls ends, and the calls begin; the turn's begin if it has no content.

    The content's words may occur in a call, too. So the place is taken from the conversation with another content.
    """
    message, spoken = messages[number], _spoken(messages[number])
    if not spoken:
        return span[0]
    before, _, after = message["content"].rpartition(spoken)
    calls = [_renamed(call) for call in message["tool_calls"]]
    other = {**message, "content": before + _CONTENT + after, "tool_calls": calls}
    probe = render([*messages[:number], other, *messages[number + 1 :]])[0]
    at, name = probe.find(_CONTENT), probe.find(_NAME)
    if not span[0] <= at < min(name, span[1]) or probe[:at] != text[:at] or not text.startswith(spoken, at):
        raise UnfitError("turns cannot be told", "the chat template writes the content of a turn behind its tool calls")
    return at + len(spoken)


def _renamed(call: Message) -> Message:
    return {**call, "function": _renamed(call["function"])} if call.get("function") else {**call, "name": _NAME}


def _reasoning(message: Message | None) -> str:
    found = next((message[n] for n in REASONING if isinstance(message.get(n), str)), "") if message else ""
    return found.strip()


def _spoken(message: Message) -> str:
    """A message's content without its thinking, as far as templates keep it."""
    content = message.get("content")
    if not isinstance(content, str):
        return ""
    if message["role"] == "assistant" and (block := _BLOCK.match(content)):
        content = content[block.end() :]
    return content.strip()


def _check_contents(text: str, messages: Sequence[Message]) -> None:
    """Each behind the one before, whose words may be the same; what the system says is put anywhere by templates."""
    behind = 0
    for i, message in enumerate(messages):
        moves = message["role"] in ("system", "developer")
        begin, end = 0 if moves else behind, len(text)
        found = False
        for form in (spoken := _spoken(message), json.dumps(spoken, ensure_ascii=False)[1:-1]):
            at = text.find(form, begin, end)
            if at >= 0:
                found, end = True, at + len(form)
        if not found:
            raise UnfitError("content lost", f"the chat template does not write the content of message {i}")
        behind = behind if moves else end


def _check_names(calls: Sequence[dict[str, Any]] | None, text: str, what: str) -> None:
    """Tools, or calls of them, are written with their names, whatever the template makes of the rest."""
    for call in calls or ():
        name = (call.get("function") or call).get("name")
        if isinstance(name, str) and name not in text:
            raise UnfitError("content lost", f"the chat template does not write the {what}, {name!r} for one")


def _check_reasoning(text: str, span: Span, message: Message) -> None:
    """Reasoning that is there must be in the turn that is trained: without it, the model learns not to think."""
    content = message.get("content")
    block = _BLOCK.match(content) if isinstance(content, str) else None
    reasoning = _reasoning(message) or (block.group(1).strip() if block else "")
    if reasoning and text.find(reasoning, *span) < 0:
        raise UnfitError(
            "content lost",
            "the chat template does not write the reasoning of a turn that is trained: remove it (data.thinking = "
            "'drop'), or make each turn a sample of its own (data.turns = 'each') if only the last one keeps it",
        )
