"""The blocks of README and docs: Python runs, TOML and JSON are what they are said to be."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from docs_pages import DOCS, PAGE, PAGES, Block, blocks

from fastsft import cli
from fastsft.config import load_config
from fastsft.synthesis.plan import load_plan
from fastsft.verify.languages import read_languages

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@PAGE
def test_toml_blocks_load(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "toml"):
        if block.options == "languages":
            (tmp_path / "languages.toml").write_text(block.content)
            read_languages(tmp_path / "languages.toml")
        elif block.options == "plan":
            load_plan(tomllib.loads(block.content))
        else:
            load_config(tomllib.loads(block.content))


@PAGE
def test_json_blocks_parse(page: Path) -> None:
    for block in blocks(page, "json"):
        for row in block.content.splitlines() if block.options.endswith(".jsonl") else [block.content]:
            json.loads(row)


def _names(page: str) -> dict[str, Any]:
    """What the blocks of a page take for granted."""
    if page not in ("README.md", "ops.md", "integrations.md"):
        return {}
    import transformers

    torch.manual_seed(0)
    head = torch.nn.Linear(32, 50, bias=False)
    ids = torch.randint(50, (7,))
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1
    )
    return {
        "model": transformers.AutoModelForCausalLM.from_config(config).train(),
        "q": torch.randn(7, 4, 32), "k": torch.randn(7, 2, 32), "v": torch.randn(7, 2, 32), "lm_head": head, "ids": ids,
        "cu_seqlens": torch.tensor([0, 3, 7], dtype=torch.int32), "targets": ids.roll(-1), "hidden": torch.randn(7, 32),
        "token_weights": torch.ones(7), "total_weight": 7.0, "backbone": torch.nn.Embedding(50, 32),
    }  # fmt: skip


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name not in ("quickstart.md", "walkthrough.md")], ids=lambda p: p.name
)
def test_blocks_run(page: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's Python in order and in one namespace, beside a tiny model; training itself is replaced."""
    import fastsft

    monkeypatch.chdir(model_folder)
    monkeypatch.setattr(type(fastsft.train), "__call__", lambda self, config: None)
    names = _names(page.name)
    for block in blocks(page, "python"):
        if block.runs:
            exec(compile(block.content, block.place, "exec"), names)
        else:
            compile(block.content, block.place, "exec")


def _run_in_order(page: Path, heard: Callable[[], str]) -> Iterator[tuple[Block, str]]:
    """As a reader would: files are written, Python runs, and commands marked ``run`` are given to the command line,
    whose words (``heard``) come back with their block."""
    names: dict[str, Any] = {}
    found = list(blocks(page))
    for block, after in itertools.zip_longest(found, found[1:]):
        said: list[str] = []
        if block.language in ("toml", "json") and block.options:
            Path(block.options).write_text(block.content)
        elif block.language == "python" and block.runs:
            exec(compile(block.content, block.place, "exec"), names)
        elif block.language == "sh" and block.options == "run":
            refused = 0
            for line in block.content.splitlines():
                try:
                    cli.main(shlex.split(line, comments=True)[1:])
                except SystemExit as stop:
                    refused += bool(stop.code)
                said.append(heard())
            shown = re.findall("^fastsft: ", after.content, re.M) if after and after.language == "text" else []
            assert refused == len(shown), f"{block.place}: {''.join(said)}"
        yield block, "".join([*said, heard()])


def test_the_quickstart_runs_from_its_first_line_to_its_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = "".join(words for _, words in _run_in_order(DOCS / "quickstart.md", lambda: capsys.readouterr().out))
    assert "«True<|endoftext|>»" in said
    assert "\nTrue\n" in said
    assert "\nFalse\nTrue\n1500 records: 1500 kept" in said


@pytest.mark.slow
def test_the_walkthrough_says_what_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Below commands that are run stands what they print, in order: some of its lines, ``...`` for what may differ."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    steps = list(_run_in_order(DOCS / "walkthrough.md", lambda: "".join(reversed(capsys.readouterr()))))
    shown = [
        (b, words) for (a, words), (b, _) in itertools.pairwise(steps) if a.options == "run" and b.language == "text"
    ]
    assert len(shown) >= 8
    for block, words in shown:
        lines = iter(line.strip() for line in words.splitlines())
        for expected in block.content.splitlines():
            pattern = ".*".join(map(re.escape, expected.strip().split("...")))
            assert any(re.fullmatch(pattern, line) for line in lines), f"{block.place}: {expected}\n{words}"
