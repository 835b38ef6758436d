"""``fastsft decontaminate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from fastsft.verbs.console import UsageError, print_json, to_json, write_text


def decontaminate(
    sources: tuple[Path, ...],
    /,
    *,
    against: tuple[Path, ...],
    output: Path | None = None,
    report: Path | None = None,
    rules: tuple[str, ...] = ("tulu3",),
    fields: dict[str, str] | None = None,
    against_fields: tuple[str, ...] = (),
    on_bad: Literal["fail", "skip"] = "fail",
    json: bool = False,
) -> None:
    """Find, and leave out, training rows that contain instances of evaluation files.

    Args:
        sources: files of JSON lines or one JSON list (plain, .gz, .zst) or Parquet, datasets folders, or folders of
            files.
        against: evaluation files, in the same formats; their rows may have any fields.
        output: write the rows that stay here in their own format, JSON lines byte for byte; a folder where sources are
            a folder or several; -o for short.
        report: write every dropped row with its evidence here, as JSON or, with a name ending in .html, as a page.
        rules: any of which drops a row: 13 (a shared 13-gram of words), 8:0.5 (more than half of an instance's words
            lie in shared 8-grams), or tulu3 (8:0.5), qwen2.5-coder (10), gpt3 (13).
        fields: our field name and the training files', e.g. --fields text content; as data.fields of a run.
        against_fields: fields of the evaluation rows to compare with; by default all strings and lists of strings.
        on_bad: a broken training row stops the command, or is counted and left out.
        json: machine-readable summary.
    """
    from fastsft.config import FIELD_NAMES, unknown_key
    from fastsft.data.decontaminate import decontaminate_files
    from fastsft.data.problems import Problems
    from fastsft.progress import bars
    from fastsft.report.contamination import contamination_page

    if not sources:
        raise UsageError("decontaminate: expected at least one source")
    for key in fields or {}:
        if key not in FIELD_NAMES:
            raise UsageError(f"decontaminate: {unknown_key(f'fields.{key}', FIELD_NAMES)}")
    for flag, target in (("--output", output), ("--report", report)):
        _check_target(flag, target, (*sources, *against))
    problems = Problems(on_bad, skip="--on-bad skip")
    with bars() as tell:
        found = decontaminate_files(
            sources, output, problems, against=against, rules=rules, against_fields=against_fields, fields=fields,
            progress=tell,
        )  # fmt: skip
    summary = {**found.to_dict(), "skipped": dict(problems.counts), "skipped_examples": problems.examples}
    if report is not None:
        write_text(report, contamination_page(summary) if report.suffix == ".html" else to_json(summary))
    if json:
        print_json(summary)
    else:
        _show(summary)
        if output is not None:
            print(f"the rows that stay are in {output}")


def _check_target(flag: str, target: Path | None, inputs: tuple[Path, ...]) -> None:
    """Refuse, before any work is done, a file that cannot be written or must not be."""
    if target is None:
        return
    if any(target.exists() and path.exists() and target.samefile(path) for path in inputs):
        raise UsageError(f"decontaminate: {flag}: expected another file than the inputs, got {target}")
    if not target.parent.is_dir():
        raise UsageError(f"decontaminate: {flag}: no folder {target.parent}")
    if flag == "--report" and target.is_dir():
        raise UsageError(f"decontaminate: --report: expected a file, got the folder {target}")


def _show(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    from fastsft.data.notices import notices

    console = Console(markup=False)  # the texts are the user's
    dropped = summary["dropped"]
    console.print(
        f"{summary['records']} records: {summary['kept']} kept, {len(dropped)} dropped by {', '.join(summary['rules'])}"
    )
    for file in summary["evaluation"]:
        console.print(
            f"{file['file']}: {file['found']} of {file['rows']} rows found, {file['without_ngrams']} too short to be",
            soft_wrap=True,
        )
    for line in notices({k: summary[k] for k in ("skipped", "skipped_examples")}):
        console.print(line, soft_wrap=True)
    if not dropped:
        return
    places = [Column(name, overflow="fold") for name in ("row", "evaluation")]  # the line number is at the end
    table = Table(*places, "rule", "covered", "shared", title="dropped, the largest shares first")
    for d in sorted(dropped, key=lambda d: -d["coverage"])[:10]:
        row, evaluation = (Path(d[key]).name for key in ("source", "evaluation"))
        table.add_row(row, evaluation, d["rule"], f"{d['coverage']:.0%}", d["passage"][:80])
    console.print(table)
