"""The ops' reference is what its script makes of the docstrings."""

from __future__ import annotations

import runpy

from docs_pages import DOCS


def test_the_page_is_what_the_docstrings_say() -> None:
    made = runpy.run_path(str(DOCS / "write_ops_reference.py"))["page"]()
    assert (DOCS / "ops-reference.md").read_text(encoding="utf-8") == made, "run make docs"
