"""``fastsft iterate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastsft.verbs.console import print_json


def iterate(plan: Path, /, *, output: str | None = None, workers: int = 2, json: bool = False) -> None:
    """Sample from a model, execute, train on what passed; in rounds. The same command after a kill goes on.

    Args:
        plan: TOML file, see examples/iterative.toml.
        output: another folder than the file's.
        workers: samples executed at once.
        json: machine-readable result.
    """
    import dataclasses
    import sys

    from fastsft.progress import bars
    from fastsft.synthesis.iterate import iterate as run
    from fastsft.synthesis.plan import load_plan

    loaded = load_plan(plan)
    if output is not None:
        loaded = dataclasses.replace(loaded, output=output)
    with bars() as tell:
        rounds = run(loaded, workers=workers, progress=tell, say=lambda line: print(line, file=sys.stderr))
    if json:
        print_json(rounds)
    else:
        _show(rounds)


def _show(rounds: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("round", "samples", "passed", "tasks solved", "rows", "held-out pass@1")
    for entry in rounds:
        found = entry.get("sampling")
        drawn = [""] * 4
        if found:
            solved = f"{found['tasks_solved']} of {found['tasks']}"
            drawn = [str(found["samples"]), f"{found['passed'] / found['samples']:.3f}", solved, str(entry["rows"])]
        table.add_row(str(entry["round"]), *drawn, f"{entry['held_out_pass_at_1']:.3f}")
    Console().print(table)
    print(f"model: {rounds[-1]['model']}")
