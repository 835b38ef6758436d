"""Chat templates: a conversation as the text that its model was trained on, in the environment of transformers."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastsft.models.control import BEGIN, END, LITERAL, RESERVED, ControlTokens

Span = tuple[int, int]  # half-open range of characters

# ChatML as the Qwen models use it, with the generation tags that mark what the assistant wrote. Tools would be lost.
CHATML = (
    "{% if tools %}{{ raise_exception('this template cannot write tools') }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['tool_calls'] %}{{ raise_exception('this template cannot write tool_calls') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


class TemplateError(ValueError):
    """A chat template that cannot be parsed, or that refused the conversation."""


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    control: ControlTokens,
    special: Mapping[str, str],
    given: Mapping[str, Any],
) -> tuple[str, list[Span]]:
    """Run a template.

    Args:
        special: bos_token and its like, for the template to write.
        given: tools, documents, add_generation_prompt and whatever else the template reads.

    Returns:
        The text, with CONTROL before each control token that the template wrote (one that stands in a message's content
        stays text), and the ranges inside ``{% generation %}`` tags.

    Raises:
        TemplateError: the template failed on this conversation.
    """
    template = _compile(source)
    content = _escaped({"messages": [_plain(m) for m in messages], "tools": None, "documents": None, **given}, control)
    try:
        written = template.render(**{**special, **content})
    except Exception as error:  # a template's own failure (None + str, a wrong key) is whatever Python raises
        raise TemplateError(f"chat template: {error}") from error
    return _take_spans(control.mark(written))


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers hands it over: without empty fields, and reasoning under the names that templates read."""
    fields = {k: v for k, v in message.items() if v is not None}
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((fields[n] for n in names if n in fields), None)
    return fields if reasoning is None else {"thinking": reasoning, **fields, "reasoning_content": reasoning}


def _escaped(value: Any, control: ControlTokens) -> Any:
    if isinstance(value, str):
        if RESERVED.search(value):
            raise TemplateError("chat template: U+FDD0 to U+FDD3 are no characters and may not stand in a conversation")
        return control.escape(value)
    if isinstance(value, Mapping):
        return {key: _escaped(inner, control) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(inner, control) for inner in value]
    return value


def _take_spans(marked: str) -> tuple[str, list[Span]]:
    pieces: list[str] = []
    spans: list[Span] = []
    length = 0
    for i, part in enumerate(marked.split(BEGIN)):
        inside, tagged, outside = part.partition(END) if i else ("", "", part)
        if i and not tagged:
            raise TemplateError("chat template: {% generation %} blocks may not be nested")
        if i:
            spans.append((length, length + len(inside)))
        pieces += [inside, outside]
        length += len(inside) + len(outside)
    return "".join(pieces), spans


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' filter: jinja's own would escape HTML."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return text.replace(json.dumps(LITERAL)[1:-1], LITERAL)


@functools.lru_cache(maxsize=32)
def _compile(source: str) -> Any:
    """Compile as transformers does: sandboxed, immutable, trimmed blocks, loop controls, generation tags."""
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{BEGIN}{caller()}{END}"

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"chat template, line {error.lineno}: {error.message}") from error
