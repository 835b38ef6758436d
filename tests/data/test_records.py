"""Every form of row that is read, and every broken one with the message that names its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fastsft.data.records import DataError, Problems, Record, of_memory, read_records


def read(path: Path | list[Path], mode: str = "fail", **options: Any) -> tuple[list[Record], Problems]:
    problems = Problems(mode)  # type: ignore[arg-type]
    paths = path if isinstance(path, list) else [path]
    return list(read_records(paths, problems, **options)), problems


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_bytes(b"".join(r + b"\n" if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in rows))
    return path


GOOD = {"text": "good"}
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


BAD: list[tuple[Any, str]] = [
    (b"{broken", "broken JSON: "),
    (b'{"text": "a"', "broken JSON: "),
    (b'{"text": "a\xff"}', "invalid UTF-8: byte 11"),
    (b'{"text": "\\ud800"}', "broken JSON: "),
    ([1], "not an object: got list"),
    ("text", "not an object: got str"),
    (
        {"body": "x"},
        "unknown format: expected messages or .* or text, got body",
    ),
    ({}, "unknown format: expected messages or .* or text, got no field"),
    ({"text": 3}, "wrong type: text: expected a string, got int"),
    ({"text": None}, "wrong type: text: expected a string, got NoneType"),
    ({"prompt": "a", "completion": ["b"]}, "wrong type: completion: expected a string, got list"),
    ({"prefix": "a", "suffix": "b", "middle": 1}, "wrong type: middle: expected a string, got int"),
    ({"messages": []}, "empty conversation"),
    ({"messages": "hi"}, "wrong type: messages: expected a list, got str"),
    ({"messages": ["hi"]}, r"wrong type: messages\[0\]: expected an object with a role"),
    ({"messages": [{"content": "x"}]}, r"wrong type: messages\[0\]: expected an object with a role"),
    ({"messages": [{"role": "robot", "content": "x"}]}, r"unknown role: messages\[0\]: .* got 'robot'"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, r"unknown role: messages\[0\]: "),
    ({"messages": [CHAT[0], {"role": "assistant"}]}, r"wrong type: messages\[1\].content: expected a string"),
    (
        {"messages": [{"role": "user", "content": [1]}]},
        r"wrong type: messages\[0\].content: expected a string, got list",
    ),
    ({"messages": [CHAT[0], {"role": "assistant", "tool_calls": "[]"}]}, r".*\[1\].tool_calls: .* objects, got str"),
    ({"messages": [CHAT[0], {"role": "assistant", "tool_calls": ["a"]}]}, "wrong type: .*tool_calls: expected a list"),
    ({"messages": [{**CHAT[1], "tool_calls": [{"function": "f"}]}]}, "wrong type: .*tool_calls: expected a list"),
    ({"text": "a", "weight": -1}, r"bad weight: weight: expected a number from 0 to 1e\+09, got -1"),
    ({"text": "a", "weight": "1"}, "bad weight: weight: expected a number from 0 to .*, got '1'"),
    ({"text": "a", "weight": None}, "bad weight: "),
    ({"text": "a", "weight": 1e39}, "bad weight: .* got 1e\\+39"),  # infinite in float32
    (b'{"text": "a", "weight": %d}' % 2**70, "bad weight: "),
    ({"text": "a", "weight": True}, "bad weight: "),
    ({"conversations": [{"from": ["human"], "value": "x"}]}, r"unknown role: messages\[0\]"),
    ({"conversations": [{"from": "human", "value": None}]}, r"wrong type: messages\[0\].content"),
    ({"conversations": [{"from": "alien", "value": "x"}]}, "unknown role: .* got 'alien'"),
    ({"conversations": []}, "empty conversation"),
    (
        {"messages": [{**CHAT[0], "more": nested(100)}]},
        r"wrong type: messages\[0\]: expected at most 100 lists and objects",
    ),
    ({"messages": CHAT, "tools": [{"parameters": nested(300)}]}, "wrong type: tools: expected at most 100 lists"),
    ({"instruction": 5, "output": "y"}, "wrong type: prompt: expected a string, got int"),
    ({"instruction": 5, "input": "x", "output": "y"}, "wrong type: prompt: expected a string"),
    ({"instruction": "a", "input": ["x"], "output": "y"}, "wrong type: prompt: expected a string"),
]


@pytest.mark.parametrize(("row", "message"), BAD, ids=[str(r)[:50] for r, _ in BAD])
def test_bad_row_names_file_and_line(row: Any, message: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", GOOD, b"", row, GOOD)
    with pytest.raises(DataError, match=rf"a\.jsonl:3: {message}"):
        read(path)
    records, problems = read(path, "skip")
    assert [r.source for r in records] == [f"{path}:1", f"{path}:4"]
    assert sum(problems.counts.values()) == 1
    (reason,) = problems.counts
    assert problems.examples[reason][0].startswith(f"{path}:3: {reason}")


def test_examples_are_few_and_counts_are_all(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", *[b"{"] * 12, GOOD)
    records, problems = read(path, "skip")
    assert len(records) == 1
    assert problems.counts["broken JSON"] == 12
    assert len(problems.examples["broken JSON"]) == 5


def test_forms_of_rows(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl",
        {"messages": CHAT, "weight": 2},
        {"prompt": "p", "completion": "c"},
        {"prefix": "a", "suffix": "c", "middle": "b"},
        {"text": "t"},
        {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "h"},
                           {"from": "gpt", "value": "g"}, {"from": "tool", "value": "t"}]},
        {"conversations": [{"from": "user", "value": "h"}, {"from": "assistant", "value": "g"}]},
        {"instruction": "do", "input": "this", "output": "done"},
        {"instruction": "do", "input": "", "output": "done"},
        {"instruction": "do", "output": "done"},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]},
    )  # fmt: skip
    records, _ = read(path)
    kinds = ["messages", "prompt_completion", "fim", "text", "messages", "messages"]
    assert [r.kind for r in records] == [*kinds, *["prompt_completion"] * 3, "messages"]
    assert records[0].weight == 2.0
    assert records[2].parts == ("a", "c", "b")
    assert records[2].text() == "abc"
    assert [m["role"] for m in records[4].messages] == ["system", "user", "assistant", "tool"]
    assert [m["content"] for m in records[4].messages] == ["s", "h", "g", "t"]
    assert records[5].messages == ({"role": "user", "content": "h"}, {"role": "assistant", "content": "g"})
    assert records[6].parts == ("do\n\nthis\n\n", "done")
    assert records[7].parts == records[8].parts == ("do\n\n", "done")
    assert records[9].text() == "assistant\nid\n1"


def test_field_names_and_explicit_format(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"question": "q", "answer": "a", "text": "t"})
    names = {"prompt": "question", "completion": "answer"}
    (record,), _ = read(path, fields=names)
    assert record.kind == "prompt_completion"
    assert record.parts == ("q", "a")
    (record,), _ = read(path, format="text")
    assert record.parts == ("t",)
    with pytest.raises(DataError, match=r"a\.jsonl:1: missing field: 'messages'"):
        read(path, format="messages")


def test_line_forms(tmp_path: Path) -> None:
    """No newline at the end, CRLF, blank lines, characters that some call line ends."""
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "a"}\r\n\n  \n{"text": "b\u2028c\x0b"}'.replace("\x0b", "\\u000b").encode())
    records, _ = read(path)
    assert [(r.source, r.parts[0]) for r in records] == [(f"{path}:1", "a"), (f"{path}:4", "b\u2028c\x0b")]


# --- kinds of files -------------------------------------------------------------------------------------------------


def test_gzip(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "b"}\n'))
    assert [r.parts[0] for r in read(path)[0]] == ["a", "b"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "not gzip", "checksum"])
def test_damaged_gzip_is_reported(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    whole = bytearray(gzip.compress(b"".join(b'{"text": "%d"}\n' % (i * i) for i in range(4000)), mtime=0))
    if damage == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "not gzip":
        path.write_bytes(b'{"text": "a"}\n')
    else:
        at = -6 if damage == "checksum" else 40  # 40: in the code tables, which zlib itself refuses
        whole[at] ^= 0xFF
        path.write_bytes(whole)
    with pytest.raises(DataError, match=r"a\.jsonl\.gz"):
        read(path)
    _, problems = read(path, "skip")
    assert problems.counts["unreadable file"] == 1


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"messages": [CHAT] * 3, "n": [1, 2, 3]}), path, row_group_size=2)
    records, _ = read(path)
    assert [r.source for r in records] == [f"{path}:{i}" for i in (1, 2, 3)]
    assert list(records[0].messages) == CHAT
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:-9])
    with pytest.raises(DataError, match="not a Parquet file"):
        read(path)
    content[4:60] = bytes(56)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet"):
        read(path)


def test_parquet_text_that_is_no_utf8(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    texts = pa.array([b"a", b"b\xff", b"c"]).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet:2: invalid UTF-8: byte 1"):
        read(tmp_path / "a.parquet")
    records, problems = read(tmp_path / "a.parquet", "skip")
    assert [(r.parts, r.source.rpartition(":")[2]) for r in records] == [(("a",), "1"), (("c",), "3")]
    assert problems.counts == {"invalid UTF-8": 1}


def test_text_of_a_conversation() -> None:
    """Words of code in a call's arguments are those of the code, however the call is written."""
    code = 'def f():\n\treturn "a"\n'
    arguments = {"path": "a.py", "text": code, "none": None, "lines": [1, 2]}
    for written in (arguments, json.dumps(arguments)):
        call = {"type": "function", "function": {"name": "edit", "arguments": written}}
        message = {"role": "assistant", "reasoning_content": "think", "content": "I edit", "tool_calls": [call]}
        record = of_memory({"messages": [CHAT[0], message]}, 0)
        assert record.text() == (
            "user\nhi\nassistant\nthink\nI edit\ntype\nfunction\nfunction\nname\nedit\narguments\n"
            f"path\na.py\ntext\n{code}\nlines\n1\n2"
        )
    broken = {"role": "assistant", "tool_calls": [{"name": "run", "arguments": "{oops"}]}
    assert of_memory({"messages": [broken]}, 0).text() == "assistant\nname\nrun\narguments\n{oops"


def test_rows_in_memory() -> None:
    record = Record("text", "x:1", parts=("a",))
    assert of_memory(record, 0) is record
    assert of_memory("a", 3) == Record("text", "#3", parts=("a",))
    assert of_memory({"prompt": "a", "completion": "b", "weight": 2}, 1).weight == 2.0
    with pytest.raises(DataError, match="#4: wrong type: text: expected a string, got int"):
        of_memory({"text": 1}, 4)
    with pytest.raises(ValueError, match=r"#5: expected a record, text, row \(dict\) or path, got int"):
        of_memory(1, 5)


def test_datasets_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    data.save_to_disk(tmp_path / "one")
    records, _ = read(tmp_path / "one")
    assert [(r.source, r.parts[0]) for r in records] == [
        (f"{tmp_path / 'one'}:{i}", t) for i, t in ((1, "a"), (2, "b"))
    ]
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match="several splits; name one of them: test, train"):
        read(tmp_path / "two")
    assert len(read(tmp_path / "two" / "train")[0]) == 2


def test_folder_of_files_in_name_order(tmp_path: Path) -> None:
    jsonl(tmp_path / "b.jsonl", {"text": "2"})
    jsonl(tmp_path / "a.jsonl", {"text": "1"})
    (tmp_path / "README.md").write_text("no data")
    assert [r.parts[0] for r in read(tmp_path)[0]] == ["1", "2"]


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("x")
    for name, message in (
        ("none.jsonl", "no such file"),
        ("empty", "not a saved dataset"),
        ("a.csv", "expected a name"),
    ):
        with pytest.raises(DataError, match=f"{name}: {message}"):
            read(tmp_path / name)


def test_weight_under_another_name(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"question": "a", "answer": "b", "loss": 0.25, "weight": "unused"})
    names = {"prompt": "question", "completion": "answer", "weight": "loss"}
    assert [r.weight for r in read(path, fields=names)[0]] == [0.25]
    alpaca = jsonl(tmp_path / "b.jsonl", {"instruction": "a", "output": "b", "loss": 2})
    assert [r.weight for r in read(alpaca, fields={"weight": "loss"})[0]] == [2.0]
    for row, message in (({"text": "a"}, "missing field: 'loss'"), ({"text": "a", "loss": -1}, "bad weight: loss: ")):
        with pytest.raises(DataError, match=f"c.jsonl:1: {message}"):
            read(jsonl(tmp_path / "c.jsonl", row), fields={"weight": "loss"})
