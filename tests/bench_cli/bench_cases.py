"""Rows and results to render and to compare."""

from __future__ import annotations

from typing import Any

from fastsft.bench.results import Result, Row

MACHINE: dict[str, Any] = {"cpu": "Toy", "isa": "avx2", "threads": 2, "versions": {"torch": "2.13.0", "fastsft": "0.1"}}


def row(group: str, contestant: str = "fastsft", median: float = 1.0, bench: str = "pack", **fields: Any) -> Row:
    return Row(
        **{
            "bench": bench, "group": group, "contestant": contestant, "median": median, "iqr": 0.02 * median,
            "rounds": 9, "extra": {}, "p20": 0.99 * median, "p80": 1.01 * median, "date": "2026-01-02", **fields,
        }
    )  # fmt: skip


def result(*rows: Row, **fields: Any) -> Result:
    return Result(**{"date": "2026-01-02", "machine": MACHINE, "rows": list(rows), **fields})
