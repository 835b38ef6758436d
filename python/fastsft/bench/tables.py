"""Results in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastsft.bench.compare import Change
from fastsft.bench.results import Result, Row, seconds
from fastsft.bench.topics import TOPICS

if TYPE_CHECKING:
    from rich.table import Table

STYLES = {"faster": "green", "slower": "bold red", "equal": ""}


def show(result: Result) -> None:
    """A table per group, and what the rivals won."""
    from rich.console import Console

    console = Console(markup=False)  # names of groups hold brackets
    for group, rows in result.groups().items():
        console.print(_group(group, rows))
    for threads, rates in result.limits.items():
        limits = ", ".join(f"{name} {rate / 1e9:,.1f} G{_unit(name)}/s" for name, rate in rates.items())
        console.print(f"limits, number of threads {threads}: {limits}")
    lost = result.lost()
    console.print(f"{len(result.contested())} groups with rivals; a rival was faster in {len(lost)}")
    for row in lost:
        console.print(f"lost: {row.group}: {row.contestant} takes {row.times_ours:.2f} of our time", style="bold red")


def _unit(limit: str) -> str:
    return "FLOP" if limit.startswith("product") else "B"


def _group(title: str, rows: Sequence[Row]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("contestant", overflow="fold")
    for name in ("median", "p20", "p80", "x ours", "of the limit"):
        table.add_column(name, justify="right")
    for row in rows:
        low, high = row.spread
        ratio = "" if row.times_ours is None else f"{row.times_ours:.2f}"
        shares = ", ".join(f"{share:.0%} {name}" for name, share in row.shares.items())
        cells = (row.contestant, seconds(row.median), seconds(low), seconds(high), ratio, shares)
        table.add_row(*cells, style="bold red" if row.beats_us else "green" if row.contestant == "fastsft" else "")
    return table


def show_changes(found: Sequence[Change], machines: Sequence[str], missing: int) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False)  # names of groups hold brackets
    for line in machines:
        console.print(f"NOT THE SAME MACHINE OR VERSIONS: {line}", style="bold red")
    table = Table()
    table.add_column("group", overflow="fold")
    table.add_column("contestant", overflow="fold")
    for name in ("before", "after", "times", "rivals'", ""):
        table.add_column(name, justify="right")
    for c in found:
        rivals = "" if c.rivals is None else f"{c.rivals:.2f}"
        table.add_row(
            c.group, c.contestant, seconds(c.before.median), seconds(c.after.median), f"{c.times:.2f}", rivals,
            c.verdict, style=STYLES[c.verdict],
        )  # fmt: skip
    console.print(table)
    counts = ", ".join(f"{sum(c.verdict == v for c in found)} {v}" for v in STYLES)
    console.print(f"{counts}; {missing} groups in one of the two only")


def show_topics() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in ("topic", "what", "benches"):
        table.add_column(name)
    for name, topic in TOPICS.items():
        table.add_row(name, topic.title, ", ".join(topic.benches))
    Console(markup=False).print(table)
