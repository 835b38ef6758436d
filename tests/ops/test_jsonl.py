"""Fields of JSON Lines against orjson: nothing accepted that it rejects, no other string, nothing plain left over."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsft import ops
from fastsft.ops import reference
from fastsft.ops.jsonl import BLANK, DECIDED, UNDECIDED

ROOT = Path(__file__).resolve().parents[2]


def strings(found: ops.jsonl.JsonlFields, width: int) -> list[list[bytes] | None]:
    """Per line the strings, separators included; None where undecided."""
    text, offsets = found.text.tobytes(), found.offsets.tolist()
    parts = [text[a:b] for a, b in itertools.pairwise(offsets)]
    rows = [parts[i * width : (i + 1) * width] for i in range(len(found.status))]
    return [r if s == DECIDED else None for r, s in zip(rows, found.status.tolist(), strict=True)]


def check(data: bytes, fields: list[str], without: list[str] = [], separator: str = "") -> int:  # noqa: B006
    """Every decided line is as orjson has it. Returns the number of decided lines."""
    found = ops.jsonl_fields(data, fields, without=without, separator=separator)
    expected = reference.jsonl_fields(data, fields, without=without, separator=separator)
    assert len(found.status) == len(expected)
    assert found.lines[0] == 0
    assert found.lines[-1] == len(data)
    assert np.all(np.diff(found.lines) > 0)
    assert found.offsets[-1] == len(found.text)
    for i, (mine, theirs) in enumerate(zip(strings(found, len(fields)), expected, strict=True)):
        line = data[found.lines[i] : found.lines[i + 1]]
        if mine is not None:
            assert theirs is not None, line
            assert mine == [s.encode() for s in theirs], line
        else:
            assert found.offsets[i * len(fields)] == found.offsets[(i + 1) * len(fields)]
        if found.status[i] == BLANK:
            assert not line.strip()
    return int((found.status == DECIDED).sum())


def source_rows() -> list[dict[str, object]]:
    """Functions' worth of real text: this repository's own files, in pieces."""
    rows: list[dict[str, object]] = []
    for path in sorted(ROOT.glob("python/fastsft/data/*.py")) + sorted(ROOT.glob("docs/*.md")):
        text = path.read_text()
        for begin in range(0, len(text), 700):
            piece = text[begin : begin + 700]
            rows.append({"text": piece, "meta": {"path": path.name, "at": [begin, 1.5e3, None, True, {}]}, "id": begin})
    return rows


@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_real_rows_are_all_decided(ensure_ascii: bool, isa: str, threads: Callable[[int], None]) -> None:
    rows = source_rows()
    rows += [{"id": -0.5, "text": 'ü 漢字 😀 \u2028 \x7f \x00 \\ " / \b\f\n\r\t' * k} for k in range(40)]
    data = "".join(json.dumps(r, ensure_ascii=ensure_ascii) + "\n" for r in rows).encode() * 4
    results = []
    for count in (1, 2, 4):
        threads(count)
        assert check(data, ["text"]) == 4 * len(rows)
        found = ops.jsonl_fields(data, ["text"])
        results.append((found.text.tobytes(), found.offsets.tobytes(), found.lines.tobytes()))
    assert results[0] == results[1] == results[2]


def test_several_fields_in_any_order() -> None:
    rng = random.Random(0)
    rows = []
    for i in range(300):
        row = {"prompt": "p" * rng.randrange(150), "completion": "é\n" * rng.randrange(90), "id": str(i)}
        keys = list(row)
        rng.shuffle(keys)
        rows.append({k: row[k] for k in keys})
    data = "\n".join(json.dumps(r) for r in rows).encode()
    for fields in (["prompt", "completion"], ["completion", "prompt"], ["id", "prompt", "completion"]):
        for separator in ("", "\n"):
            assert check(data, fields, separator=separator) == len(rows)


DECIDABLE = [
    b'{"text":"a"}', b' \t{ "text" : "a" , "x" : [ ] }\r', b'{"x":{},"text":""}',
    b'{"text":"a","x":[[],{},[{"y":[1]}]]}', b'{"text":"\\u0041\\ud83d\\ude00\\u00e9\\u20AC\\/"}',
    '{"text":"é€😀\U0010ffff"}'.encode(), b'{"text":"a","x":-0.0e+9}',
    b'{"text":"a","n":0,"t":true,"f":false,"z":null}', b'{"text":"a","x":"\\u0000"}',
    b'{"text":"a","text2":1,"tex":2}', b'{"x":1,"x":2,"text":"a"}',
    b'{"text":"a","x":' + b"[" * 60 + b"]" * 60 + b"}",
]  # fmt: skip
UNDECIDABLE = [
    b"{}", b"[]", b'"text"', b"{", b"}", b"{broken", b'{"text"}', b'{"text":}', b'{"text":"a"', b'{"text":"a}',
    b'{"text":"a",}', b'{"text":"a"}x', b'{"text":"a"} {}', b'{"text":1}', b'{"text":null}', b'{"text":["a"]}',
    b'{"text":"a","text":"b"}', b'{"te\\u0078t":"a"}', b'{"text":"a","x":01}', b'{"text":"a","x":1.}',
    b'{"text":"a","x":.5}', b'{"text":"a","x":+1}', b'{"text":"a","x":-}', b'{"text":"a","x":1e}',
    b'{"text":"a","x":1e400}', b'{"text":"a","x":NaN}', b'{"text":"a","x":Infinity}', b'{"text":"a","x":tru}',
    b'{"text":"a","x":[1,]}', b'{"text":"a","x":[1 2]}', b'{"text":"a","x":{"y"}}', b'{"text":"a","x":{"y":1,}}',
    b'{"text":"a","x":[}', b'{"text":"a","x":{]}', b'{"text":"a","x":[1}}', b'{"text":"a\tb"}', b'{"text":"a\x1fb"}',
    b'{"text":"\\x41"}', b'{"text":"\\u12"}', b'{"text":"\\u12g4"}', b'{"text":"\\ud800"}',
    b'{"text":"\\ud800\\u0041"}', b'{"text":"\\udc00"}', b'{"text":"a","x":"\\ud800"}', b'{"text":"a","\\ud800":1}',
    b'{"text":"\xff"}', b'{"text":"\xc0\x80"}', b'{"text":"\xed\xa0\x80"}', b'{"text":"\xe0\x80\x80"}',
    b'{"text":"\xf0\x80\x80\x80"}', b'{"text":"\xf4\x90\x80\x80"}', b'{"text":"\xc3"}', b'{"text":"\xe2\x82"}',
    b'{"text":"\xf5\x80\x80\x80"}', b'\xef\xbb\xbf{"text":"a"}', b'{"text":"a"}\x00', b'{"text":"a"}\x0b',
    b'{text:"a"}', b"{'text':'a'}", b'{"text":"a","x":' + b"[" * 2000 + b"]" * 2000 + b"}",
    b'{"text":"a","x":' + b"[" * 100_000, b'{"text":"a","x":' + b"9" * 400 + b"}", b'{"text":"a" "x":1}',
    b'{"text" "a"}', b'{,"text":"a"}', b'{"text":"a",,"x":1}', b'{"text":"\\',
]  # fmt: skip


@pytest.mark.parametrize("tail", [b"", b"\n", b'\n{"text":"' + b"z" * 200 + b'"}\n'], ids=["end", "newline", "more"])
def test_by_hand(tail: bytes, isa: str) -> None:
    for line in DECIDABLE:
        assert ops.jsonl_fields(line + tail, ["text"]).status[0] == DECIDED, line
        check(line + tail, ["text"])
    for line in UNDECIDABLE:
        assert ops.jsonl_fields(line + tail, ["text"]).status[0] == UNDECIDED, line
        check(line + tail, ["text"])
    everything = b"\n".join(DECIDABLE + UNDECIDABLE)
    assert check(everything + tail, ["text"]) >= len(DECIDABLE)


def test_blank_lines_and_nothing() -> None:
    assert ops.jsonl_fields(b"", ["text"]).offsets.tolist() == [0]
    found = ops.jsonl_fields(b'\n \t\r\n{"text":"a"}\n\x0b\n  ', ["text"])
    assert found.status.tolist() == [BLANK, BLANK, DECIDED, UNDECIDED, BLANK]
    assert found.text.tobytes() == b"a"


def test_unwanted_names() -> None:
    data = b'{"text":"a"}\n{"text":"a","messages":[]}\n{"text":"a","x":{"messages":1}}\n'
    assert ops.jsonl_fields(data, ["text"], without=["messages"]).status.tolist() == [DECIDED, UNDECIDED, DECIDED]
    check(data, ["text"], ["messages"])


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.dictionaries(st.sampled_from(["text", "a", "b", "x y"]), VALUES), st.text(max_size=200)),
        max_size=5,
    ),
    st.booleans(),
)
def test_any_json(rows: list[tuple[dict[str, object], str]], ensure_ascii: bool) -> None:
    lines = [json.dumps({**row, "text": text}, ensure_ascii=ensure_ascii) for row, text in rows]
    kept = [line for line in lines if "\\ud" not in line or ensure_ascii]
    data = "\n".join(kept).encode(errors="surrogatepass")
    check(data, ["text"])
    check(data, ["text", "a"], ["b"])


def mutate(rng: random.Random, line: bytes) -> bytes:
    data = bytearray(line)
    pieces = [
        b'"', b"\\", b"\\u", b"\\ud83d", b"{", b"}", b"[", b"]", b",", b":", b"\x00", b"\xff", b"\xc3",
        b"\xed\xa0\x80", b"1e9", b"-", b"0", b".", b"null", b" ", b"\n", b"\r", b"text", b'"text":"x",',
        b"\xf0\x9f\x98\x80",
    ]  # fmt: skip
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind == 1:
            del data[at : at + rng.randint(1, 8)]
        elif kind == 2:
            data[at:at] = rng.choice(pieces)
        elif kind == 3:
            del data[at:]
        elif at < len(data):
            data[at] ^= 1 << rng.randrange(8)
    return bytes(data)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_rows(seed: int, isa: str) -> None:
    rng = random.Random(seed)
    rows = [json.dumps(r, ensure_ascii=rng.random() < 0.5).encode() for r in rng.sample(source_rows(), 30)]
    rows += [b'{"text":"a\\n\\u00e9\\ud83d\\ude00b","x":[1,-2.5e3,{"y":null}],"z":true}'] * 30
    lines = [mutate(rng, line) for line in rows for _ in range(25)]
    decided = check(b"\n".join(lines), ["text"])
    assert 50 < decided < len(lines)
    for line in lines[:200]:  # at the end of a buffer, where blocks do not fit
        check(line, ["text"])


def test_a_huge_line() -> None:
    text = 'x = 1\n\t"é"' * 300_000
    data = json.dumps({"a": [text], "text": text}).encode()
    found = ops.jsonl_fields(data, ["text"])
    assert found.text.tobytes().decode() == text
    assert ops.jsonl_fields(data[:-1], ["text"]).status.tolist() == [UNDECIDED]
    assert orjson.loads(data)["text"] == text


def test_a_buffer_of_ones_own() -> None:
    out = np.full(64, 7, np.uint8)
    found = ops.jsonl_fields(b'{"text":"abc"}\n', ["text"], out=out)
    assert found.text.tobytes() == b"abc"
    assert np.shares_memory(found.text, out)
    assert out[15:].tolist() == [7] * 49


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="fields: expected at least one"):
        ops.jsonl_fields(b"{}", [])
    with pytest.raises(ValueError, match="twice a"):
        ops.jsonl_fields(b"{}", ["a"], without=["a"])
    with pytest.raises(ValueError, match="separator: expected at most one byte"):
        ops.jsonl_fields(b"{}", ["a"], separator="ab")
    with pytest.raises(ValueError, match="expected a sequence of names"):
        ops.jsonl_fields(b"{}", "text")
    with pytest.raises(ValueError, match="out: expected"):
        ops.jsonl_fields(b"{}", ["a"], out=np.empty(1, np.uint8))
    with pytest.raises(ValueError, match="data: expected uint8"):
        ops.jsonl_fields(np.zeros(3, np.int32), ["a"])
