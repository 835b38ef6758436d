"""Filters: each rule on texts made for it, masking, what is counted, and code that does not parse."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsft.config import ConfigError, FilterOptions, load_config
from fastsft.data.filters import MEASURES, _fenced, _Text, apply, syntax_error, written
from fastsft.data.notices import notices
from fastsft.data.prepare import prepare
from fastsft.data.problems import Problems
from fastsft.data.records import Record
from fastsft.models.tokenizer import Tokenizer

PROSE = "The cat sat on the mat. It was a warm day, and the sun stood high. Then the rain came!"


def passes(text: str, **options: Any) -> bool:
    return bool(list(apply([Record("text", "x:1", parts=(text,))], FilterOptions(**options), Problems("fail"))))


@pytest.mark.parametrize(
    ("options", "good", "bad"),
    [
        ({"min_chars": 5}, "12345", "1234"),
        ({"max_chars": 5}, "12345", "123456"),
        ({"min_words": 3}, "a b c", "a b"),
        ({"max_words": 3}, "a b c", "a b c d"),
        ({"min_mean_word": 3}, "abc abc", "ab abc"),
        ({"max_mean_word": 3}, "abc abc", "abc abcd"),
        ({"min_alphabetic": 0.8}, "a b c d 1", "a b c 1 2"),
        ({"min_stop_words": 2}, "The end of it", "The end"),
        ({"min_sentences": 3}, PROSE, "One. Two (3.5 m) and more"),
        ({"min_terminal": 0.5}, "Yes.\nno", "Yes.\nno\nno"),
        ({"max_symbols": 0.25}, "a b c #d", "a # c #"),
        ({"max_bullets": 0.5}, "- a\nb", "- a\n* b\nc"),
        ({"max_ellipses": 0.5}, "a...\nb", "a...\nb…\nc"),
        ({"max_duplicate_lines": 0.34}, "a\nb\n a", "a\na\nb\nb"),
        ({"max_line": 4}, "abcd\nabc", "abc\nabcde"),
        ({"placeholders": True}, PROSE, "def f():\n    # Your code here"),
        ({"placeholders": True}, "insert a row", "Dear [insert name],"),
        ({"text_language": "python"}, "def f(x):\n    return '\\d'\n", "def f(x)\n    return x\n"),
        ({"fenced_languages": ["python"]}, "```py\nx = 1\n```\n```js\nx = = 1\n```", "So:\n```python\nx = = 1\n```"),
    ],
)
def test_rules(options: dict[str, Any], good: str, bad: str) -> None:
    assert passes(good, **options)
    assert not passes(bad, **options)
    assert passes(bad)


FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+#-]+)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.M | re.S)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["```", " ```\t", "```py", "\t``` c++ x", "````", "x", "", "``` ```", "\r"]), max_size=12)
)
def test_fences(lines: list[str]) -> None:
    text = "\n".join(lines)
    assert list(_fenced(text)) == [(m[1], m[2]) for m in FENCE.finditer(text)]


def test_fences_that_are_never_closed() -> None:
    """Each line is looked at once: minutes, if each opening looked for its end."""
    assert passes("```python\n" * 50_000, fenced_languages=["python"])


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", sorted(MEASURES))
def test_measures_take_linear_time(name: str) -> None:
    """Marks that end no sentence, by the thousand: a quadratic rule takes minutes."""
    for text in ("." * 50_000 + "x", "." + "'" * 50_000 + "x", "!?" * 25_000 + "x", "... " * 12_500 + "x"):
        MEASURES[name](_Text(text))
    assert MEASURES["sentences"](_Text("One... two?! (Three.) 4.5 six.")) == 4


def test_every_limit_has_its_measure() -> None:
    limits = {n.partition("_")[2] for n in FilterOptions.__dataclass_fields__ if n.startswith(("min_", "max_"))}
    assert limits == set(MEASURES)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_measures_of_any_text(text: str) -> None:
    everything: dict[str, Any] = {f"max_{n}": 1e9 for n in MEASURES if f"max_{n}" in FilterOptions.__dataclass_fields__}
    assert passes(text, **everything, mask=["email", "ip"])
    syntax_error(text, "python")


def test_only_what_the_model_writes_is_measured() -> None:
    turns = ({"role": "user", "content": "long question"}, {"role": "assistant", "content": "yes"})
    assert written(Record("messages", "x:1", messages=turns)) == "yes"
    assert written(Record("prompt_completion", "x:1", parts=("long question", "yes"))) == "yes"
    assert written(Record("fim", "x:1", parts=("def f(", "): pass", "x"))) == "def f(x): pass"
    calls = ({"role": "assistant", "content": None, "tool_calls": [{}]},)
    assert written(Record("messages", "x:1", messages=calls)) == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("write to jo.doe+x@mail.example.org, please", "write to <EMAIL>, please"),
        ("@decorator\na @ b; git@github; x@1.2", "@decorator\na @ b; git@github; x@1.2"),
        ("host 8.8.4.4 and 192.168.0.1, 127.0.0.1.", "host <IP_ADDRESS> and 192.168.0.1, 127.0.0.1."),
        ("v1.2.3.4, 1.2.3.4.5, 1.2.3, 300.1.1.1", "v1.2.3.4, 1.2.3.4.5, 1.2.3, 300.1.1.1"),
        ("at 2606:4700:4700::1111!", "at <IP_ADDRESS>!"),
        ("x[::2], a::b, std::cout, 12:34:56, ::1, fe80::1", "x[::2], a::b, std::cout, 12:34:56, ::1, fe80::1"),
    ],
)
def test_masks(text: str, expected: str) -> None:
    options = FilterOptions(mask=["email", "ip"])
    problems = Problems("fail")
    (record,) = apply([Record("text", "x:1", parts=(text,))], options, problems)
    assert record.parts == (expected,)
    assert bool(problems.counts) == (text != expected)
    call = {"name": "send", "arguments": {"to": [text]}}
    turns = ({"role": "user", "content": text}, {"role": "assistant", "content": "", "tool_calls": [call]})
    (record,) = apply([Record("messages", "x:2", messages=turns)], options, problems)
    assert record.messages[0]["content"] == expected
    assert record.messages[1]["tool_calls"][0]["arguments"]["to"] == [expected]


def test_other_languages_by_their_grammar() -> None:
    pytest.importorskip("tree_sitter")
    pytest.importorskip("tree_sitter_javascript")
    assert syntax_error("const f = (x) => x + 1;\n", "js") is None
    assert syntax_error("const a = 1;\nconst b = = 2;\n", "javascript") == "line 2"
    assert not passes("```js\nconst b = = 2;\n```", fenced_languages=["javascript"])


def test_a_language_without_a_parser() -> None:
    with pytest.raises(ConfigError, match=r"pip install tree-sitter tree-sitter-klingon.* got 'klingon'"):
        passes("x", text_language="klingon")


def test_report_and_notices(tmp_path: Path) -> None:
    (tmp_path / "tok").mkdir()
    Tokenizer.train([PROSE] * 9, 300).save(tmp_path / "tok")
    rows = [PROSE, "short", "also short", PROSE + " Ask a@b.org.", PROSE + " your code here"]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    raw: dict[str, Any] = {
        "output": str(tmp_path / "run"), "tokenizer": {"path": str(tmp_path / "tok")},
        "data": {"train": [str(path)], "eval_fraction": 0.0,
                 "filters": {"min_chars": 20, "placeholders": True, "mask": ["email"]}},
    }  # fmt: skip
    found = prepare(load_config(raw))
    assert found.report["skipped"] == {"filters.min_chars": 2, "masked e-mail": 1, "filters.placeholders": 1}
    assert found.report["rows"] == 5
    assert len(found.train) == 2
    lines = notices(found.report)
    assert f"left out: 2 x filters.min_chars, e.g. {path}:2: filters.min_chars: 5" in lines
    assert f"changed: 1 x masked e-mail, e.g. {path}:4: masked e-mail: 1 of them" in lines
    assert "<EMAIL>" in found.tokenizer.decode(found.train[1].ids.tolist())
    with pytest.raises(ConfigError, match=r"data\.filters\.min_chars: expected at least 0, got -1"):
        load_config({"data": {"filters": {"min_chars": -1}}})
