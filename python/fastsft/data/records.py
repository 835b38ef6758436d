"""Rows of the user's files as typed records, each knowing the file and line it came from."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import orjson

from fastsft.data.problems import DataError as DataError
from fastsft.data.problems import Problems as Problems
from fastsft.data.shapes import as_ours, parsed
from fastsft.data.sources import find_sources, open_dataset, open_parquet
from fastsft.data.streams import DAMAGE, read_blocks

Kind = Literal["messages", "prompt_completion", "text", "fim"]
ROLES = ("system", "user", "assistant", "tool", "developer")

# format -> the fields a row must have; "auto" takes the first format whose fields are all there
FIELDS: dict[Kind, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "fim": ("prefix", "suffix", "middle"),
    "text": ("text",),
}
REASONING = ("reasoning_content", "thinking", "reasoning")  # fields of a message, as templates read them
MAX_WEIGHT = 1e9  # sums of these, over all tokens of a batch, are far from float32's limit
_MAX_DEPTH = 100  # of lists and objects in a message or tool: what reads them recurses


@dataclass(frozen=True)
class Record:
    """One row. ``messages`` for conversations; otherwise ``parts`` in the order of :data:`FIELDS`."""

    kind: Kind
    source: str  # "train.jsonl:12"
    messages: tuple[dict[str, Any], ...] = ()
    parts: tuple[str, ...] = ()
    weight: float = 1.0
    tools: tuple[dict[str, Any], ...] | None = None  # what the assistant may call, for the chat template
    origin: int = 0  # the number of its entry in data.sources
    skills: tuple[str, ...] = ()  # that it exercises, by the user's names

    def canonical(self) -> bytes:
        """Equal for equal rows only: all that its sample is made of, except weight and skills; wherever it is from."""
        # json and not orjson: a record built by hand may hold lone surrogates and integers of any size
        content = (self.kind, self.parts, self.messages, self.tools)
        return json.dumps(content, sort_keys=True, default=str).encode()

    def text(self) -> str:
        """What was said, to compare with others: who said it, reasoning and the tools that were called, but not the
        tools on offer, which are long and the same in many rows."""
        if self.kind == "messages":
            return "\n".join(map(_turn, self.messages))
        if self.kind == "fim":
            prefix, suffix, middle = self.parts
            return prefix + middle + suffix
        return "\n".join(self.parts)


def _turn(message: dict[str, Any]) -> str:
    said = [message["role"], *(message.get(name) for name in REASONING), message.get("content")]
    return "\n".join([*(str(part) for part in said if part), *_called(message.get("tool_calls"))])


def _called(calls: Any) -> list[str]:
    """The names and values in tool calls, not as JSON, whose escapes would become part of the words of code."""
    found: list[str] = []
    left = [calls]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            for name, value in reversed(item.items()):
                if value is not None:  # columns with a fixed schema have every field of every row
                    left += [parsed(value) if name == "arguments" else value, name]
        elif isinstance(item, list | tuple):
            left += reversed(item)
        elif item is not None:
            found.append(str(item))
    return found


@dataclass(frozen=True)
class Row:
    """A parsed row before it is interpreted. ``raw`` is the line's bytes where the file has lines."""

    source: str
    value: Any
    raw: bytes = b""


def read_rows(path: str | os.PathLike[str], problems: Problems) -> Iterator[Row]:
    """Rows of a file of JSON lines, of one JSON list or of Parquet, of a Hugging Face ``datasets`` folder, or of a
    folder of files.

    Broken lines go to ``problems``; empty lines are skipped.

    Raises:
        DataError: the path does not exist or has an unknown kind.
    """
    for source in find_sources(path):
        if source.kind == "lines":
            yield from _read_lines(source.path, problems)
        elif source.kind == "parquet":
            yield from _read_parquet(source.path, problems)
        else:
            for number, value in enumerate(open_dataset(source.path), 1):
                yield Row(f"{source.path}:{number}", value)


def read_records(
    paths: Sequence[str | os.PathLike[str]],
    problems: Problems,
    *,
    format: Literal["auto", "messages", "prompt_completion", "text", "fim"] = "auto",
    fields: dict[str, str] | None = None,
) -> Iterator[Record]:
    """Records of all files in order. ``fields`` maps our field names to those of the file."""
    for path in paths:
        for row in read_rows(path, problems):
            record = interpret(row, problems, format=format, fields=fields or {})
            if record is not None:
                yield record


def interpret(row: Row, problems: Problems, *, format: str, fields: dict[str, str]) -> Record | None:
    """Turn a row into a record, or report why not and return None."""
    value = row.value
    if not isinstance(value, dict):
        problems.add(row.source, "not an object", f"got {type(value).__name__}")
        return None
    if not fields.keys() - {"weight", "skills"}:
        try:
            value = as_ours(value)
        except ValueError as error:
            problems.add(row.source, "wrong type", str(error))
            return None
    if format == "auto":
        found = [kind for kind, names in FIELDS.items() if all(fields.get(n, n) in value for n in names)]
        if not found:
            problems.add(row.source, "unknown format", _fields(value))
            return None
        kind = found[0]
    else:
        kind = format  # type: ignore[assignment]
    key = fields.get("weight", "weight")
    if "weight" in fields and key not in value:
        problems.add(row.source, "missing field", repr(key))
        return None
    weight = value.get(key, 1.0)
    if not is_weight(weight):
        problems.add(row.source, "bad weight", f"{key}: expected a number from 0 to {MAX_WEIGHT:g}, got {weight!r:.80}")
        return None
    key = fields.get("skills", "skills")
    skills = value.get(key)
    if skills is not None and not (isinstance(skills, list) and all(isinstance(s, str) for s in skills)):
        problems.add(row.source, "wrong type", f"{key}: expected a list of strings, got {skills!r:.80}")
        return None
    common: dict[str, Any] = {"weight": float(weight), "skills": tuple(skills or ())}
    parts: list[Any] = []
    for name in FIELDS[kind]:
        key = fields.get(name, name)
        if key not in value:
            problems.add(row.source, "missing field", repr(key))
            return None
        parts.append(value[key])
    if kind == "messages":
        reason = _wrong_messages(parts[0])
        if reason:
            problems.add(row.source, *reason)
            return None
        tools, reason = _tools(value.get(fields.get("tools", "tools")))
        if reason:
            problems.add(row.source, *reason)
            return None
        return Record(kind, row.source, messages=tuple(parts[0]), tools=tools, **common)
    for name, part in zip(FIELDS[kind], parts, strict=True):
        if not isinstance(part, str):
            problems.add(
                row.source, "wrong type", f"{fields.get(name, name)}: expected a string, got {type(part).__name__}"
            )
            return None
    return Record(kind, row.source, parts=tuple(parts), **common)


def is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_WEIGHT


def of_memory(given: Any, number: int) -> Record:
    """A record, a text, or a row as files have them, that is the ``number``-th of a list.

    Raises:
        DataError: a row that cannot be used. ValueError: anything else.
    """
    if isinstance(given, Record):
        return given
    if isinstance(given, str):
        return Record("text", f"#{number}", parts=(given,))
    if not isinstance(given, dict):
        raise ValueError(f"#{number}: expected a record, text, row (dict) or path, got {type(given).__name__}")
    return cast(Record, interpret(Row(f"#{number}", given), Problems("fail"), format="auto", fields={}))


def _fields(value: dict[str, Any]) -> str:
    expected = " or ".join(" + ".join(names) for names in FIELDS.values())
    names = ", ".join(sorted(map(str, value)))[:200] or "no field"
    return f"expected {expected}, got {names}; other names are told by fields (--fields, or data.fields of a run)"


def _wrong_messages(messages: Any) -> tuple[str, str] | None:
    if not isinstance(messages, list):
        return "wrong type", f"messages: expected a list, got {type(messages).__name__}"
    if not messages:
        return "empty conversation", ""
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message:
            return "wrong type", f"messages[{i}]: expected an object with a role"
        if message["role"] not in ROLES:
            return "unknown role", f"messages[{i}]: expected one of {', '.join(ROLES)}, got {message['role']!r}"
        calls = message.get("tool_calls")
        if calls is not None and not _are_calls(calls):
            return "wrong type", f"messages[{i}].tool_calls: expected a list of objects, got {type(calls).__name__}"
        if not isinstance(message.get("content"), str) and not calls:
            return (
                "wrong type",
                f"messages[{i}].content: expected a string, got {type(message.get('content')).__name__}",
            )
        if _deeper(message, _MAX_DEPTH):
            return "wrong type", f"messages[{i}]: expected at most {_MAX_DEPTH} lists and objects in one another"
    return None


def _are_calls(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(call, dict) and isinstance(call.get("function"), dict | None) for call in value
    )


def _tools(value: Any) -> tuple[tuple[dict[str, Any], ...] | None, tuple[str, str] | None]:
    """(tools, what is wrong). A list, or the JSON of one: columns with a fixed schema cannot hold tools otherwise."""
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            return None, ("wrong type", f"tools: not JSON: {error}")
    if value is None:
        return None, None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        return None, ("wrong type", f"tools: expected a list of objects, got {type(value).__name__}")
    if _deeper(value, _MAX_DEPTH):
        return None, ("wrong type", f"tools: expected at most {_MAX_DEPTH} lists and objects in one another")
    return tuple(value), None


def _deeper(value: Any, limit: int) -> bool:
    """Whether more than ``limit`` lists and objects lie in one another."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return False
    return limit == 0 or any(_deeper(item, limit - 1) for item in value)


def parse_line(path: Path, number: int, line: bytes, problems: Problems) -> Row | None:
    """The row on a line; None for an empty line, and for a broken one after it went to ``problems``."""
    if not line.strip():
        return None
    source = f"{path}:{number}"
    try:
        return Row(source, orjson.loads(line), line)
    except orjson.JSONDecodeError as error:
        try:
            line.decode("utf-8")
            problems.add(source, "broken JSON", f"{error.msg} at character {error.pos + 1}")
        except UnicodeDecodeError as bad:
            problems.add(source, "invalid UTF-8", f"byte {bad.start}: {bad.reason}")
    return None


def _read_lines(path: Path, problems: Problems) -> Iterator[Row]:
    number = 0
    try:
        for block in read_blocks(path, 1 << 20):
            for line in io.BytesIO(block):
                number += 1
                row = parse_line(path, number, line, problems)
                if row is not None:
                    yield row
    except DAMAGE as error:  # a truncated or damaged .gz or .zst
        problems.add(str(path), "unreadable file", str(error))


def _read_parquet(path: Path, problems: Problems) -> Iterator[Row]:
    import pyarrow as pa

    table = open_parquet(path)
    number = 0
    batches = table.iter_batches(batch_size=1024)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (pa.ArrowException, OSError) as error:  # a damaged page
            problems.add(str(path), "unreadable file", str(error))
            return
        for i, value in table_values(batch, path, number, problems):
            yield Row(f"{path}:{number + i + 1}", value)
        number += batch.num_rows


def table_values(table: Any, path: Path, position: int, problems: Problems) -> Iterator[tuple[int, Any]]:
    """The number, from 0, and value of each row of an Arrow table or batch before which the file has ``position`` rows.
    Rows with text that is not UTF-8 go to ``problems``."""
    try:
        values = table.to_pylist()
    except UnicodeDecodeError:
        for i in range(table.num_rows):
            try:
                value = table.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                problems.add(f"{path}:{position + i + 1}", "invalid UTF-8", f"byte {error.start}: {error.reason}")
            else:
                yield i, value
        return
    yield from enumerate(values)
