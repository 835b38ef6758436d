"""data-format.md: what it says a row becomes is what data preparation makes of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from docs_pages import DOCS, blocks

from fastsft.config import load_config
from fastsft.data.prepare import prepare

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def _rows_and_samples() -> list[tuple[str, str, str]]:
    """(row, options, sample) of data-format.md: each ``sample`` block belongs to the ``json`` block before it."""
    pairs = []
    row = ""
    for block in blocks(DOCS / "data-format.md", "json", "sample"):
        if block.language == "json":
            row = block.content
        else:
            pairs.append((row, block.options, block.content.removesuffix("\n")))
    return pairs


@pytest.mark.parametrize(("row", "options", "sample"), _rows_and_samples())
def test_samples_are_what_comes_out(row: str, options: str, sample: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(json.loads(row)) + "\n")
    raw: dict[str, Any] = tomllib.loads(options.replace("; ", "\n"))
    raw |= {"output": str(tmp_path / "run"), "tokenizer": {"train_vocab": 300}}
    raw["data"] = {"train": [str(tmp_path / "rows.jsonl")], "eval_fraction": 0.0, **raw.get("data", {})}
    prepared = prepare(load_config(raw))
    assert len(prepared.train) == 1
    found, inside = "", False
    for token, weight in zip(prepared.train[0].ids.tolist(), prepared.train[0].weights.tolist(), strict=True):
        if (weight > 0) != inside:
            found += "«" if weight > 0 else "»"
            inside = weight > 0
        found += prepared.tokenizer.decode([token], False)
    assert (found + "»" * inside).removesuffix("\n") == sample


def test_there_is_a_sample_of_every_format() -> None:
    assert len(_rows_and_samples()) >= 10
