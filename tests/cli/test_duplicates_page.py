"""The page of ``fastsft dedup --report x.html``."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest

from fastsft import cli
from fastsft.report.duplicates import duplicates_page


def test_page() -> None:
    pytest.importorskip("matplotlib", reason="part of the report extra")
    summary = {
        "records": 130, "kept": 12, "exact_duplicates": 100, "near_duplicates": 18,
        "cluster_sizes": {1: 9, 2: 1, 4: 2, 7: 3, 103: 1},
        "clusters": [{"size": 103, "sources": ["a.jsonl:1", "a.jsonl:2"], "example": "<script>alert(1)</script>"}],
        "skipped": {"broken JSON": 2}, "skipped_examples": {"broken JSON": ["a.jsonl:7: broken <JSON>"]},
    }  # fmt: skip
    page = duplicates_page(summary)
    assert "<script" not in page
    assert html.escape("<script>alert(1)</script>") in page
    assert "a.jsonl:7: broken &lt;JSON&gt;" in page
    rows = re.findall(r'<tr><td class="n">([^<]*)</td><td class="n">(\d+)</td></tr>', page)
    assert rows == [("1", "9"), ("2", "1"), ("4 to 7", "5"), ("64 to 127", "1")]
    assert "<svg" in page
    assert not re.search(r'(src|href)="(?!#)', page)


def test_from_the_command(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a b"}\n' * 3)
    cli.main(["dedup", str(tmp_path / "a.jsonl"), "--report", str(tmp_path / "r.html")])
    assert "1 of 3 records kept" in (tmp_path / "r.html").read_text()
