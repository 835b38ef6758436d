"""Pages are found, and what they point to exists."""

from __future__ import annotations

import re
from pathlib import Path

from docs_pages import DOCS, LANGUAGES, PAGE, PAGES, ROOT, blocks, prose


def _anchors(page: Path) -> set[str]:
    """GitHub's names of the headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@PAGE
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"\w+:", target):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path) if path else page
            assert linked.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in _anchors(linked), f"{page.name}: {target}"


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = re.findall(r"\]\(([\w-]+\.md)\)", index)
    assert sorted([*listed, "index.md"]) == sorted(p.name for p in PAGES[1:])


def test_the_readme_points_to_the_index() -> None:
    assert "(docs/index.md)" in PAGES[0].read_text(encoding="utf-8")


def test_examples_that_are_named_exist() -> None:
    for name in re.findall(r"\bexamples/[\w.]+", "".join(p.read_text(encoding="utf-8") for p in PAGES)):
        assert (ROOT / name).is_file(), name


@PAGE
def test_blocks_name_their_language(page: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, block.place


@PAGE
def test_a_reason_is_given_where_a_block_does_not_run(page: Path) -> None:
    for block in blocks(page):
        if "not run" in block.content:
            assert block.language in ("python", "sh"), block.place
            assert not block.runs, f"{block.place}: the marker is '# not run: REASON' in the first line"
