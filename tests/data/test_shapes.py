"""ShareGPT and Alpaca rows: what their turns, calls and parts become, and what is said of broken ones."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastsft.data.records import DataError, Record, of_memory

CALL = {"name": "add", "arguments": {"a": 1}}
TOOL = {"name": "add", "description": "adds", "parameters": {"type": "object"}}


def wrapped(function: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": function}


def sharegpt(*turns: tuple[str, Any], **rest: Any) -> Record:
    return of_memory({"conversations": [{"from": who, "value": what} for who, what in turns], **rest}, 0)


@pytest.mark.parametrize("calls", [[CALL], [CALL, {"name": "now", "arguments": {}}]])
@pytest.mark.parametrize("thought", ["", "<think>so\n</think>"])
def test_calls_and_observations(calls: list[dict[str, Any]], thought: str) -> None:
    written = json.dumps(calls if len(calls) > 1 else calls[0])
    record = sharegpt(
        ("human", "1 + 1?"), ("function_call", thought + written), ("observation", "2"), ("gpt", "It is 2.")
    )
    assert record.messages == (
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": thought, "tool_calls": [wrapped(call) for call in calls]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    )


def test_arguments_written_as_a_string() -> None:
    written = json.dumps({"name": "add", "arguments": json.dumps(CALL["arguments"])})
    (message,) = sharegpt(("function_call", written)).messages
    assert message["tool_calls"] == [wrapped(CALL)]


@pytest.mark.parametrize("value", ["add(1)", "[]", "{}", "[1]", '{"name": "add"}', "<think>hm</think>"])
def test_turns_without_a_call(value: str) -> None:
    with pytest.raises(DataError, match=r"#0: wrong type: conversations\[1\]\.value: expected the JSON of a call"):
        sharegpt(("human", "hi"), ("function_call", value))


def test_system_and_tools_beside_the_turns() -> None:
    record = sharegpt(("human", "hi"), ("gpt", "yo"), system="Be brief.", tools=json.dumps([TOOL, wrapped(TOOL)]))
    assert record.messages[0] == {"role": "system", "content": "Be brief."}
    assert record.tools == (wrapped(TOOL), wrapped(TOOL))
    assert sharegpt(("human", "hi"), tools=[TOOL]).tools == (wrapped(TOOL),)
    bare = sharegpt(("system", "first"), ("human", "hi"), system="second", tools="")
    assert [m["content"] for m in bare.messages] == ["first", "hi"]
    assert bare.tools is None
    assert sharegpt(("human", "hi"), system="", tools=None).messages == ({"role": "user", "content": "hi"},)
    with pytest.raises(DataError, match="wrong type: tools: not JSON"):
        sharegpt(("human", "hi"), tools="[oops")
    with pytest.raises(DataError, match=r"unknown role: messages\[0\]: .* got 'narrator'"):
        sharegpt(("narrator", "hi"))


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Add."}, "Add.\n\n"),
        ({"instruction": "Add.", "input": ""}, "Add.\n\n"),
        ({"instruction": "Add.", "input": None}, "Add.\n\n"),
        ({"instruction": "Add.", "input": "1, 2"}, "Add.\n\n1, 2\n\n"),
    ],
)
def test_alpaca(row: dict[str, Any], prompt: str) -> None:
    assert of_memory({**row, "output": "3"}, 0).parts == (prompt, "3")


@pytest.mark.parametrize(
    "row", [{"instruction": 1}, {"instruction": 1, "input": "a"}, {"instruction": "a", "input": [1]}]
)
def test_alpaca_of_other_types(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="#0: wrong type: prompt: expected a string"):
        of_memory({**row, "output": "3"}, 0)
