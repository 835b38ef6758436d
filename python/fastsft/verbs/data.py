"""``fastsft dedup`` and ``fastsft prepare``."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastsft.verbs.console import UsageError, print_json, to_json, write_text

if TYPE_CHECKING:
    from rich.text import Text

    from fastsft.config import Config
    from fastsft.data.batch import Sample
    from fastsft.models.tokenizer import Tokenizer


def dedup(
    source: Path,
    /,
    *,
    output: Path | None = None,
    report: Path | None = None,
    fields: dict[str, str] | None = None,
    threshold: float = 0.7,
    num_perm: int = 128,
    ngram: int = 5,
    unit: Literal["word", "char"] = "word",
    mode: Literal["near", "exact"] = "near",
    on_bad: Literal["fail", "skip"] = "fail",
    json: bool = False,
) -> None:
    """Find exact and near duplicates in a JSONL, Parquet or datasets source; keep the first of each cluster.

    Args:
        source: JSONL(.gz) or Parquet file, or a datasets folder.
        output: write the kept lines here, byte for byte (JSONL sources); -o for short.
        report: write clusters and counts here, as JSON.
        fields: our field name and the file's, e.g. --fields text content; as data.fields of a run.
        threshold: estimated Jaccard similarity from which two texts are near duplicates, above 0 and at most 1.
        num_perm: hash functions per signature.
        ngram: words or characters per shingle.
        unit: of what shingles are made.
        mode: near (includes exact) or exact only.
        on_bad: a broken row stops the command, or is counted and left out.
        json: machine-readable summary.
    """
    from fastsft.config import FIELD_NAMES, unknown_key
    from fastsft.data.dedup import dedup as find
    from fastsft.data.dedup import dedup_file
    from fastsft.data.records import Problems, read_records
    from fastsft.progress import bars

    for key in fields or {}:
        if key not in FIELD_NAMES:
            raise UsageError(f"dedup: {unknown_key(f'fields.{key}', FIELD_NAMES)}")
    _check_target("--output", output, source)
    _check_target("--report", report, source)
    problems = Problems(on_bad, skip="--on-bad skip")
    options: dict[str, Any] = {
        "threshold": threshold, "num_perm": num_perm, "ngram": ngram, "unit": unit, "mode": mode,
    }  # fmt: skip
    with bars() as tell:
        if output is not None:
            found = dedup_file(source, output, problems, fields=fields, progress=tell, **options)
        else:
            found = find(list(read_records([source], problems, fields=fields)), progress=tell, **options)
    summary = {**found.to_dict(), "skipped": dict(problems.counts), "skipped_examples": problems.examples}
    if report is not None:
        write_text(report, to_json(summary))
    if json:
        print_json(summary)
    else:
        _show_duplicates(summary)


def _check_target(flag: str, target: Path | None, source: Path) -> None:
    """Refuse, before any work is done, a file that cannot be written or must not be."""
    if target is None:
        return
    if target.is_dir():
        raise UsageError(f"dedup: {flag}: expected a file, got the folder {target}")
    if target.exists() and target.samefile(source):
        raise UsageError(f"dedup: {flag}: expected another file than the input, got {target}")
    if not target.parent.is_dir():
        raise UsageError(f"dedup: {flag}: no folder {target.parent}")


def _show_duplicates(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from fastsft.data.prepare import notices

    console = Console(markup=False)  # the texts are the user's
    console.print(
        f"{summary['records']} records: {summary['kept']} kept, {summary['exact_duplicates']} exact and "
        f"{summary['near_duplicates']} near duplicates"
    )
    for line in notices(summary):
        console.print(line, soft_wrap=True)
    if not summary["clusters"]:
        return
    table = Table("size", "members", "begins with", title="largest clusters")
    for cluster in summary["clusters"][:10]:
        table.add_row(
            str(cluster["size"]), "\n".join(Path(s).name for s in cluster["sources"][:3]), cluster["example"][:80]
        )
    console.print(table)


def prepare(config: Config, *, show: int = 0, json: bool = False) -> None:
    """Read, check, tokenise, mask and store the data of a run, and report what was left out.

    Args:
        show: print this many samples with the trained tokens coloured by weight; « » where the output is no terminal.
        json: machine-readable report.
    """
    import fastsft
    from fastsft.progress import bars

    with bars() as tell:
        prepared = fastsft.prepare(config, progress=tell)
    if json:
        print_json(prepared.report)
        return
    from rich.console import Console

    from fastsft.data.prepare import notices

    console = Console(markup=False)
    for name in ("train", "eval"):
        part = prepared.report[name]
        console.print(f"{name}: {part['samples']} samples, {part['tokens']} tokens, {part['trained_tokens']} trained")
    for line in notices(prepared.report):
        console.print(line, soft_wrap=True)
    for i in range(min(show, len(prepared.train))):
        sample = prepared.train[i]
        console.print(f"\n{sample.source}", style="bold")
        console.print(_coloured(sample, prepared.tokenizer, console.is_terminal), soft_wrap=True)


def _coloured(sample: Sample, tokenizer: Tokenizer, terminal: bool) -> Text:
    """A sample's text by the weight of its tokens: a colour for each weight, or « » around what is trained, with the
    weight where the sample has several."""
    from rich.text import Text

    levels = sorted({float(w) for w in sample.weights if w > 0}, reverse=True)
    text = Text()
    if terminal and len(levels) > 1:
        for weight in levels:
            text.append(f" {weight:.4g} ", style=_style(levels, weight)).append(" ")
        text.append("\n")
    tokens = zip(sample.ids.tolist(), sample.weights.tolist(), strict=True)
    for weight, run in itertools.groupby(tokens, lambda pair: pair[1]):
        piece = tokenizer.decode([token for token, _ in run], False)
        if weight > 0 and not terminal:
            piece = f"«{piece}»" if len(levels) == 1 else f"«{weight:.4g}: {piece}»"
        text.append(piece, style=_style(levels, weight) if weight > 0 else "dim")
    return text


def _style(levels: list[float], weight: float) -> str:
    colours = ("green", "yellow", "cyan", "magenta", "blue")
    return f"black on {colours[min(levels.index(weight), len(colours) - 1)]}"
