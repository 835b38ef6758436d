"""Tables of keys, options and reasons: every one that the code has, with its default."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from typing import Any

import pytest
from docs_pages import DOCS, ROOT

from fastsft.config import Config
from fastsft.engine.request import SamplingParams
from fastsft.verify.sandbox import Limits


def test_every_reason_is_documented() -> None:
    page = (DOCS / "data-format.md").read_text(encoding="utf-8")
    source = "".join((ROOT / "python/fastsft/data" / f).read_text() for f in ("records.py", "tokenise.py", "turns.py"))
    called = re.findall(r'(?:problems\.(?:add|note)\(\s*[^,]+,|UnfitError\()\s*"([^"]+)"', source)
    returned = re.findall(r'return \(?\s*"([a-z ]+)",', source)
    assert len(called) > 8
    assert len(returned) > 2
    for reason in {*called, *returned}:
        assert f"`{reason}`" in page, reason


def _keys(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> default of every leaf."""
    keys: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if dataclasses.is_dataclass(inner):
            keys |= _keys(inner, f"{prefix}{field.name}.")
        else:
            keys[prefix + field.name] = inner
    return keys


def _table(page: str) -> dict[str, str]:
    """Key -> default as written, of all table rows that begin with a key and a default in backquotes."""
    text = (DOCS / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| `([^`]+)` \|", text, re.M)
    assert len(dict(rows)) == len(rows), "a key stands twice"
    return {key: default.replace("\\|", "|") for key, default in rows}


def test_every_key_of_a_run_is_documented_with_its_default() -> None:
    expected = {k: "unset" if v is None else json.dumps(v) for k, v in _keys(Config()).items()}
    documented = _table("training.md")
    assert documented.keys() == expected.keys()
    for key, default in expected.items():
        written = documented[key]
        assert written == default or float(written) == float(default), key


@pytest.mark.parametrize(("page", "options"), [("engine.md", SamplingParams()), ("verify.md", Limits())])
def test_options_are_documented_with_their_defaults(page: str, options: Any) -> None:
    expected = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    documented = _table(page)
    assert expected.keys() <= documented.keys()
    for name, default in expected.items():
        assert ast.literal_eval(documented[name]) == default, name
