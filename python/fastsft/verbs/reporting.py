"""``fastsft report``."""

from __future__ import annotations

from pathlib import Path

from fastsft.verbs.console import UsageError, print_json, write_text


def report(runs: tuple[Path, ...], /, *, output: Path | None = None, json: bool = False) -> None:
    """Write one HTML page about a training run, or one that compares several.

    Args:
        runs: folders of runs, finished or not.
        output: the page; by default report.html in the run's folder, of several comparison.html here; -o for short.
        json: machine-readable figures of each run.
    """
    from fastsft.report.run import Run
    from fastsft.report.runs import runs_page

    if not runs:
        raise UsageError("report: expected at least one run's folder")
    found = Run.read_all(runs)
    target = output or (runs[0] / "report.html" if len(runs) == 1 else Path("comparison.html"))
    if not target.parent.is_dir():
        raise UsageError(f"report: --output: no folder {target.parent}")
    write_text(target, runs_page(found))
    if json:
        print_json([run.summary() for run in found])
    else:
        print(target)
