"""The pages of the documentation and their fenced blocks.

A block's language says what the tests do with it:

    python   run, in the page's order and in one namespace, beside a tiny model; ``signature`` behind it: parsed
    sh       every line is parsed by the program that it calls; with ``run`` behind the language, fastsft's are run
    toml     loaded as the configuration of a run; ``languages`` or ``plan`` behind it name another kind of file
    json     parsed
    sample   in data-format.md, what the ``json`` block before it becomes
    text     nothing: synopses, trees of files; but in walkthrough.md, behind ``sh run``, lines that the commands print

``toml`` and ``json`` followed by a file's name are written to the folder in which the page's other blocks run. A block
that cannot run has the first line ``# not run: REASON``, which readers see.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
LANGUAGES = ("python", "sh", "toml", "json", "sample", "text")
NOT_RUN = re.compile(r"(?:#!.*\n)?# not run: (\S.{9,})\n")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, its language, the rest of the info string, and what is in it."""

    place: str
    language: str
    options: str
    content: str

    @property
    def runs(self) -> bool:
        return NOT_RUN.match(self.content) is None and self.options != "signature"


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of ``page`` in these languages, or all of them."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"^```(\w*)[ ]*(.*?)\n(.*?)^```$", text, re.M | re.S):
        language, options, content = match.groups()
        place = f"{page.name}:{text.count(chr(10), 0, match.start()) + 1}"
        if not languages or language in languages:
            found.append(Block(place, language, options, content))
    return found


def prose(page: Path) -> str:
    """The page without its blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
