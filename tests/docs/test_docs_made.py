"""What is made from the code is what its script makes: the ops' reference and the picture."""

from __future__ import annotations

import runpy

import pytest
from docs_pages import DOCS


@pytest.mark.parametrize(
    ("script", "function", "made"),
    [("write_ops_reference", "page", "ops-reference.md"), ("draw_architecture", "picture", "architecture.svg")],
)
def test_it_is_what_the_script_makes(script: str, function: str, made: str) -> None:
    content = runpy.run_path(str(DOCS / f"{script}.py"))[function]()
    assert (DOCS / made).read_text(encoding="utf-8") == content, "run make docs"
