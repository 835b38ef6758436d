"""The site of these pages: ``make docs`` builds it into build/docs with Sphinx and MyST, every warning an error.

The pages are written for GitHub first. The navigation is index.md's own lists, so that it cannot miss a page; links to
files of the repository become files of the site.
"""

import re

from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

project = "fastsft"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "fastsft"
html_copy_source = False
myst_heading_anchors = 4


def _navigation(app: Sphinx, name: str, source: list[str]) -> None:
    """Give index.md a hidden table of contents for each of its sections."""
    if name == "index":
        for section in source[0].split("\n## ")[1:]:
            caption, _, body = section.partition("\n")
            pages = "\n".join(re.findall(r"\]\(([\w-]+)\.md\)", body))
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{pages}\n```\n"


def setup(app: Sphinx) -> None:
    app.add_lexer("sample", TextLexer)  # blocks of data-format.md, which the tests know by this name
    app.connect("source-read", _navigation)
