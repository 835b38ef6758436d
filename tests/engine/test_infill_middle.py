"""Where a middle that an editor asked for ends, as its pieces come."""

from __future__ import annotations

from typing import Any

import pytest

from fastsft.engine.request import Update
from fastsft.engine.server.infill import Middle
from fastsft.engine.server.protocol import InfillBody


@pytest.mark.parametrize(
    ("options", "texts", "shown", "ended"),
    [
        ({"n_indent": 4}, ["a", "\n    b\n", "  ", "c\n    d"], "a\n    b\n  ", "limit"),  # what was shown stays
        ({"n_indent": 4}, ["a\n    b\n\n", "    c\n", "", "d"], "a\n    b\n\n    c\n", "limit"),
        ({"n_indent": 4}, ["a\n    b\n  c"], "a\n    b", "limit"),
        ({"n_indent": 4}, ["a\n    b\n", "    c"], "a\n    b\n    c", None),
        ({}, ["a\nb", "\nc"], "a\nb\nc", None),
        ({"t_max_predict_ms": 1e-6}, ["a", "b\n", "c"], "ab\n", "limit"),
    ],
)
def test_the_middle_ends_where_editors_want(
    options: dict[str, Any], texts: list[str], shown: str, ended: str | None
) -> None:
    middle, found = Middle(InfillBody.parse(options)), ""
    for text in texts:
        if middle.stop_type is None:
            found += middle.take(Update("a", 0, (1,), text, None, None, None, 0, 0.0))
    assert (found, middle.stop_type) == (shown, ended)
    assert middle.text == shown
