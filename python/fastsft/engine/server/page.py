"""The built-in page, and a policy that lets it run its own script and talk to its own server alone."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re


def page_and_policy() -> tuple[str, str]:
    """The HTML, and the value of its Content-Security-Policy header."""
    page = importlib.resources.files("fastsft.engine.server").joinpath("page.html").read_text(encoding="utf-8")

    def hashes(tag: str) -> str:
        contents = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(c.encode()).digest()).decode()}'" for c in contents)

    policy = (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy
