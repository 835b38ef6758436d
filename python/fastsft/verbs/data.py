"""``fastsft dedup`` and ``fastsft prepare``."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastsft.verbs.console import UsageError, print_json, to_json, write_text

if TYPE_CHECKING:
    from rich.text import Text

    from fastsft.config import Config
    from fastsft.data.batch import Sample
    from fastsft.models.tokenizer import Tokenizer


def dedup(
    sources: tuple[Path, ...],
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
    on: tuple[str, ...] = (),
    keep: Literal["first", "longest", "source", "score"] = "first",
    prefer: tuple[Path, ...] = (),
    score: str | None = None,
    max_cluster: int | None = 1000,
    memory: str | None = None,
    work: Path | None = None,
    index: Path | None = None,
    engine: Literal["local", "ray"] = "local",
    verify: Literal["exact", "signature"] = "exact",
    on_bad: Literal["fail", "skip"] = "fail",
    json: bool = False,
) -> None:
    """Find exact and near duplicates in JSONL, Parquet or datasets sources; keep one row of each cluster.

    Args:
        sources: files of JSON lines or one JSON list (plain, .gz, .zst) or Parquet, datasets folders, or folders of
            files; duplicates are found across all of them.
        output: write the kept rows here in their own format, JSON lines byte for byte; a folder where sources are a
            folder or several; -o for short.
        report: write clusters and counts here, as JSON or, with a name ending in .html, as a page with a plot.
        fields: our field name and the file's, e.g. --fields text content; as data.fields of a run.
        threshold: Jaccard similarity from which two texts are near duplicates, above 0 and at most 1.
        num_perm: hash functions per signature.
        ngram: words or characters per shingle.
        unit: of what shingles are made.
        mode: near (includes exact) or exact only.
        on: what is compared instead of whole rows, e.g. --on prompt: fields by our names (text, prompt, completion,
            prefix, suffix, middle) and roles of messages (user, assistant, ...).
        keep: the row of a cluster that stays: the first in the order of the sources, the one with the longest text,
            that of the source which comes first in --prefer, or the one with the highest --score.
        prefer: files among the sources, the best first, for --keep source; all others come last.
        score: field of numbers, for --keep score; by default the row's weight.
        max_cluster: limit of the different texts in one cluster, against chains that join texts with nothing in common;
            the clusters of an index have none.
        memory: what to hold at most, e.g. 4GiB, for sources that do not fit; by default everything is held.
        work: folder for the files of the stages, by default beside the output; after an interruption the same command
            takes them up, at the end they are removed.
        index: folder that remembers rows: the sources are compared with all that were added to it earlier, and added.
        engine: ray runs the stages as tasks of a Ray cluster, whose nodes see the same files; --memory is of each task.
        verify: compare candidates by their texts, which reads them again, or by their signatures alone, an estimate.
        on_bad: a broken row stops the command, or is counted and left out.
        json: machine-readable summary.
    """
    from fastsft.config import FIELD_NAMES, unknown_key
    from fastsft.data.dedup_files import dedup_files
    from fastsft.data.index import dedup_with_index
    from fastsft.data.link import LinkOptions
    from fastsft.data.problems import Problems
    from fastsft.data.scan import SketchOptions
    from fastsft.progress import bars
    from fastsft.report.duplicates import duplicates_page

    if not sources:
        raise UsageError("dedup: expected at least one source")
    for key in fields or {}:
        if key not in FIELD_NAMES:
            raise UsageError(f"dedup: {unknown_key(f'fields.{key}', FIELD_NAMES)}")
    _check_target("--output", output, sources)
    _check_target("--report", report, sources)
    if report is not None and report.is_dir():
        raise UsageError(f"dedup: --report: expected a file, got the folder {report}")
    limit = None if memory is None else _bytes("--memory", memory)
    if index is not None and (keep != "first" or prefer or score is not None):
        raise UsageError("dedup: --index: expected --keep first, without --prefer and --score: earlier rows stay")
    if index is not None and engine != "local":
        raise UsageError("dedup: --index: expected --engine local")
    if (limit is not None or engine == "ray") and work is None and index is None:
        if output is None:
            flag = "--memory" if engine == "local" else "--engine ray"
            raise UsageError(f"dedup: {flag}: expected --work or --output as well, for the files of the stages")
        work = output.with_name(f".{output.name}.work")
    problems = Problems(on_bad, skip="--on-bad skip")
    sketch = SketchOptions(
        mode, threshold, num_perm, ngram, unit, fields=fields or {}, keep_signatures=verify == "signature"
    )  # fmt: skip
    how = LinkOptions(verify, max_cluster if index is None else None)
    with bars() as tell:
        if index is None:
            found = dedup_files(
                sources, output, problems, sketch=sketch, how=how, on=on or None, keep=keep, prefer=prefer,
                score=score, memory=limit, work=work, engine=engine, progress=tell,
            )  # fmt: skip
        else:
            found = dedup_with_index(
                sources, output, problems, index, sketch=sketch, how=how, on=on or None, memory=limit, progress=tell
            )  # fmt: skip
    summary = {**found.to_dict(), "skipped": dict(problems.counts), "skipped_examples": problems.examples}
    if report is not None:
        write_text(report, duplicates_page(summary) if report.suffix == ".html" else to_json(summary))
    if json:
        print_json(summary)
    else:
        _show_duplicates(summary)
        if output is not None:
            print(f"the rows that stay are in {output}")


def _check_target(flag: str, target: Path | None, sources: tuple[Path, ...]) -> None:
    """Refuse, before any work is done, a file that cannot be written or must not be."""
    if target is None:
        return
    if any(target.exists() and source.exists() and target.samefile(source) for source in sources):
        raise UsageError(f"dedup: {flag}: expected another file than the input, got {target}")
    if not target.parent.is_dir():
        raise UsageError(f"dedup: {flag}: no folder {target.parent}")


def _bytes(flag: str, written: str) -> int:
    """4GiB, 500MB or 1e9 as a number of bytes."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?) ?([A-Za-z]*)", written)
    if match is None or match[2].upper() not in units:
        raise UsageError(f"dedup: {flag}: expected a size such as 4GiB or 500MB, got {written}")
    count = int(float(match[1]) * units[match[2].upper()])
    if count < 1 << 25:
        raise UsageError(f"dedup: {flag}: expected at least 32MiB, got {written}")
    return count


def _show_duplicates(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    from fastsft.data.notices import notices

    console = Console(markup=False)  # the texts are the user's
    console.print(
        f"{summary['records']} records: {summary['kept']} kept, {summary['exact_duplicates']} exact and "
        f"{summary['near_duplicates']} near duplicates"
    )
    for line in notices(summary):
        console.print(line, soft_wrap=True)
    if not summary["clusters"]:
        return
    table = Table("size", Column("members", overflow="fold"), "begins with", title="largest clusters")
    for cluster in summary["clusters"][:10]:
        table.add_row(
            str(cluster["size"]), "\n".join(Path(s).name for s in cluster["sources"][:3]), cluster["example"][:80]
        )
    console.print(table)


def prepare(config: Config, *, show: int = 0, json: bool = False) -> None:
    """Read, check, tokenise, mask and store the data of a run, and report what was left out.

    Args:
        show: print this many samples with the trained tokens coloured by segment; « » where the output is no terminal.
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

    from fastsft.data.notices import notices

    console = Console(markup=False)
    for name in ("train", "eval"):
        part = prepared.report[name]
        console.print(f"{name}: {part['samples']} samples, {part['tokens']} tokens, {part['trained_tokens']} trained")
    for source in prepared.report["sources"] if len(prepared.report["sources"]) > 1 else ():
        console.print(f"  {source['name']}: {source['samples']} samples, {source['trained_tokens']} tokens trained")
    for line in notices(prepared.report):
        console.print(line, soft_wrap=True)
    folder = Path(config.output) / "data" / prepared.report["key"]
    console.print(f"samples and report.json are in {folder}", soft_wrap=True)
    for i in range(min(show, len(prepared.train))):
        sample = prepared.train[i]
        console.print(f"\n{sample.source}", style="bold")
        console.print(coloured(sample, prepared.tokenizer, console.is_terminal), soft_wrap=True)


def coloured(sample: Sample, tokenizer: Tokenizer, terminal: bool) -> Text:
    """A sample's text with what is trained coloured by its segment, or else in « » with the weight where the sample has
    several."""
    from rich.text import Text

    from fastsft.data.batch import segments_of
    from fastsft.data.segments import Segment

    kinds = segments_of([sample]).tolist() if terminal else [Segment.ANSWER] * len(sample.ids)
    tokens = [*zip(sample.weights.tolist(), kinds, sample.ids.tolist(), strict=True)]
    trained = {(segment, weight) for weight, segment, _ in tokens if weight > 0}
    text = Text()
    if terminal:
        for segment, weight in sorted(trained):
            text.append(f" {Segment(segment).label} {weight:.4g} ", style=_STYLES[segment]).append(" ")
        text.append("\n")
    for (weight, segment), run in itertools.groupby(tokens, lambda token: token[:2]):
        piece = tokenizer.decode([token for *_, token in run], False)
        if weight > 0 and not terminal:
            piece = f"«{piece}»" if len(trained) == 1 else f"«{weight:.4g}: {piece}»"
        text.append(piece, style=_STYLES[segment] if weight > 0 else "dim")
    return text


_STYLES = [f"black on {colour}" for colour in ("blue", "cyan", "green", "magenta", "yellow")]
"""By segment."""
