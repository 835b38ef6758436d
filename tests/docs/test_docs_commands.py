"""Every command of README and docs is one: its program takes these verbs, flags and values. Nothing is run."""

from __future__ import annotations

import functools
import inspect
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from docs_pages import PAGE, PAGES, ROOT, blocks, prose

from fastsft import cli

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Programs of others, whose options nothing here can check.
FOREIGN = {"cibuildwheel", "curl", "export", "git", "hf", "lm_eval"}


def _commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Place and words of every command: the lines of ``sh`` blocks, and what stands in a line of the text as
    ``fastsft ...`` or ``make ...``, but for patterns, which have brackets or words in capitals."""
    for block in blocks(page, "sh"):
        for line in block.content.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield f"{block.place}: {line}", words
    for found in re.findall(r"`((?:fastsft|make) [\w-]+(?: [^`]*)?)`", prose(page)):
        if not re.search(r"[\[<]|\b[A-Z]+\b", found):
            yield f"{page.name}: {found}", shlex.split(found, comments=True)


@pytest.fixture
def parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Hands the words behind ``fastsft`` to the command line, whose verbs only bind what they are given. A verb alone,
    ``fastsft dedup``, is a mention."""
    parsed: list[str] = []

    def stub(verb: str, function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def record(*args: Any, **kwargs: Any) -> None:
            inspect.signature(function).bind(*args, **kwargs)
            parsed.append(verb)

        return record

    monkeypatch.setattr(cli, "VERBS", {v: (stub(v, f), config) for v, (f, config) in cli.VERBS.items()})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "run.toml").touch()

    def fastsft(words: list[str]) -> None:
        verb, *rest = words
        if rest:
            cli.main(words)
            assert parsed.pop() in (verb, f"{verb} {rest[0]}")
        else:
            assert verb in cli.VERBS or verb in ("--help", "--version")

    return fastsft


def _make(words: list[str]) -> None:
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):(?!=)", text, re.M))
    variables = {*re.findall(r"^(\w+) \?=", text, re.M), "PIP_EXTRA_INDEX_URL"}
    for word in words:
        name, equals, _ = word.partition("=")
        assert name in (variables if equals else targets), word


def _pip(words: list[str]) -> None:
    assert words[0] in ("install", "wheel")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        if match := re.fullmatch(r"(?:fastsft|\.)\[([\w,-]+)\]", word):
            assert set(match[1].split(",")) <= set(extras), word


def _python(words: list[str]) -> None:
    if words[0] == "-m":
        (_pip if words[1] == "pip" else lambda _: None)(words[2:])
        assert words[1] in ("pip", "pytest", "venv")
    else:
        assert (ROOT / words[0]).is_file(), words[0]


def _torchrun(words: list[str]) -> list[str]:
    """The words behind ``fastsft``."""
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()
    parser.allow_abbrev = False
    given = parser.parse_args(words)
    assert given.module
    assert given.training_script == "fastsft"
    return list(given.training_script_args)


@PAGE
def test_commands_parse(page: Path, parse: Callable[[list[str]], None]) -> None:
    for place, words in _commands(page):
        while re.match(r"[A-Z_]+=", words[0]) or words[0] == "srun":
            del words[0]
        program, *rest = words
        try:
            if program == "torchrun":
                program, rest = "fastsft", _torchrun(rest)
            known = {"fastsft": parse, "make": _make, "pip": _pip, "python": _python, "python3": _python}
            assert program in known or program in FOREIGN, program
            if program in known:
                known[program](rest)
        except (AssertionError, SystemExit) as error:
            pytest.fail(f"{place}: {error}")


def test_the_readme_has_commands() -> None:
    assert len(list(_commands(PAGES[0]))) >= 5
