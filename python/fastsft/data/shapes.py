"""ShareGPT and Alpaca rows, with the fields that LLaMA-Factory gives them, as rows of our own formats."""

from __future__ import annotations

import re
from typing import Any

import orjson

_ROLES = {
    "human": "user", "gpt": "assistant", "system": "system", "tool": "tool",
    "function_call": "assistant", "observation": "tool",
}  # fmt: skip
_THOUGHT = re.compile(r"\s*<think>.*?</think>", re.DOTALL)


def as_ours(value: dict[str, Any]) -> dict[str, Any]:
    """ShareGPT conversations as messages, Alpaca rows as prompt and completion; everything else unchanged.

    Raises:
        ValueError: a ``function_call`` turn that holds no calls.
    """
    turns = value.get("conversations")
    if "messages" not in value and isinstance(turns, list) and all(isinstance(t, dict) and "from" in t for t in turns):
        return _sharegpt(value, turns)
    if "prompt" not in value and {"instruction", "output"} <= value.keys():
        prompt = _alpaca_prompt(value["instruction"], value.get("input"))
        return {**value, "prompt": prompt, "completion": value["output"]}
    return value


def parsed(arguments: Any) -> Any:
    """The arguments of a call, which are often JSON within JSON; templates write objects, and strings as strings."""
    try:
        return orjson.loads(arguments) if isinstance(arguments, str) else arguments
    except orjson.JSONDecodeError:
        return arguments


def _sharegpt(value: dict[str, Any], turns: list[dict[str, Any]]) -> dict[str, Any]:
    messages = [_message(turn, f"conversations[{i}].value") for i, turn in enumerate(turns)]
    system = value.get("system")
    if system and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": system})
    return {**value, "messages": messages, "tools": _tools(value.get("tools"))}


def _message(turn: dict[str, Any], place: str) -> dict[str, Any]:
    role = _ROLES.get(str(turn["from"]), turn["from"])
    content = turn.get("value")
    if turn["from"] != "function_call" or not isinstance(content, str):
        return {"role": role, "content": content}
    thought = _THOUGHT.match(content)
    said = thought[0] if thought else ""
    return {"role": role, "content": said, "tool_calls": _calls(content[len(said) :], place)}


def _calls(written: str, place: str) -> list[dict[str, Any]]:
    try:
        calls = orjson.loads(written)
    except orjson.JSONDecodeError:
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in calls):
        raise ValueError(f"{place}: expected the JSON of a call (name, arguments) or of several, got {written!r:.80}")
    return [{"type": "function", "function": {**call, "arguments": parsed(call["arguments"])}} for call in calls]


def _tools(tools: Any) -> Any:
    """Descriptions of functions in the wrapping in which templates expect them; whatever is none is left as it is."""
    if isinstance(tools, str):
        try:
            tools = orjson.loads(tools) if tools.strip() else None
        except orjson.JSONDecodeError:
            return tools
    if not isinstance(tools, list):
        return tools
    bare = [isinstance(tool, dict) and "name" in tool and "function" not in tool for tool in tools]
    return [{"type": "function", "function": t} if b else t for t, b in zip(tools, bare, strict=True)]


def _alpaca_prompt(instruction: Any, context: Any) -> Any:
    """The parts between blank lines, the last of which keeps the answer apart; anything but strings unchanged."""
    if not isinstance(instruction, str) or not isinstance(context, str | None):
        return context if isinstance(instruction, str) else instruction
    return "".join(f"{part}\n\n" for part in (instruction, context) if part)
