"""``fastsft bench``, ``fastsft bench list`` and ``fastsft bench compare``."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from pathlib import Path

from fastsft.verbs.console import UsageError, print_json


def bench(
    topics: tuple[str, ...],
    /,
    *,
    quick: bool = False,
    data: Path | None = None,
    references: tuple[Path, ...] = (),
    documents: int | None = None,
    models: Path | None = None,
    rivals: tuple[Path, ...] = (),
    only: str | None = None,
    json: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Time fastsft beside its rivals on this machine, by topics.

    Results are checked before anything is timed. Exits with 1 if a bench fails; Ctrl-C keeps what was measured.

    Args:
        topics: what to measure, e.g. attention loss; `fastsft bench list` shows the topics, all is every one.
        quick: a smoke: of each bench the first case, few rounds, small corpora. Its times say little.
        data: rows as for training, to measure dedup and pack on, instead of this machine's Python files.
        references: evaluation sets for decontaminate, JSON Lines.
        documents: of the corpus, at most; at least 1.
        models: folder where the models of decode are kept from run to run.
        rivals: Pythons of environments with rivals that want versions of their own: engines, vLLM, text-dedup,
            datatrove. A rival runs in the first that has it.
        only: of the cases those whose name matches, an expression as pytest's -k takes it.
        json: where the results go, - for the standard output; `fastsft bench compare` reads such files. Missing folders
            are made.
        plot: a picture of them, .png or .svg; likewise.
    """
    from fastsft.bench.plot import FORMATS
    from fastsft.bench.results import Result, machine, summarise
    from fastsft.bench.run import Given, WrongExpression, files_of, has_runner, run
    from fastsft.bench.topics import chosen, missing
    from fastsft.progress import bars

    try:
        wanted = chosen(topics)
    except ValueError as error:
        raise UsageError(f"bench: {error}") from None
    several = [("rivals", path) for path in rivals] + [("references", path) for path in references]
    for flag, path in (("data", data), *several):
        if path is not None and not path.exists():
            raise UsageError(f"bench: --{flag}: no such file: {path}")
    if data is not None and not _has_rows(data):
        raise UsageError(f"bench: --data: no row of {data} is training data: messages, prompt and completion, or text")
    if documents is not None and documents < 1:
        raise UsageError(f"bench: --documents: expected at least 1, got {documents}")
    if plot is not None and plot.suffix not in FORMATS:
        raise UsageError(f"bench: --plot: expected a name that ends in {' or '.join(FORMATS)}, got {plot}")
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("bench: --plot needs matplotlib: pip install 'fastsft[report]'")
    if not has_runner():
        raise UsageError("bench: needs pytest-benchmark: pip install 'fastsft[bench]'")
    if absent := missing(wanted.values()):
        print(f"not installed, so left out: {', '.join(absent)} (pip install 'fastsft[rivals]')", file=sys.stderr)
    for flag, path in (("json", json), ("plot", plot)):
        if path is not None and str(path) != "-":
            _make_room(flag, path)
    given = Given(data, references, documents, models, rivals, quick)
    try:
        with bars() as tell:
            measured = run(files_of(wanted.values()), given, tell, ("-k", only) if only else ())
    except WrongExpression as error:
        raise UsageError(f"bench: --only: expected words joined by and, or and not, got {only!r}: {error}") from None
    except RuntimeError as error:  # pytest's own words
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
    rows = summarise(measured.benchmarks)
    if measured.interrupted and not rows:
        raise KeyboardInterrupt
    if not rows and not measured.failed:
        if only and not measured.skipped:
            raise UsageError(f"bench: --only: expected words of cases' names, got {only!r}, which is in none of them")
        raise UsageError(f"bench: nothing was measured, {measured.skipped} cases were skipped")
    result = Result(rows[0].date if rows else "", machine(), rows, measured.limits)
    if json is not None and str(json) != "-":
        result.write(json)
    if plot is not None:
        from fastsft.bench.plot import draw

        draw(result, plot)
    if str(json) == "-":
        print_json(result.to_dict())
    else:
        from fastsft.bench.tables import show

        show(result)
    for case, why in measured.failed:
        print(f"failed: {case}: {why}", file=sys.stderr)
    if measured.interrupted:
        raise KeyboardInterrupt
    if measured.failed:
        raise SystemExit(1)


def _make_room(flag: str, path: Path) -> None:
    """Before anything is measured: the folder of a result that could not be written afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"bench: --{flag}: expected a file that can be written, got {path}")


def _has_rows(data: Path) -> bool:
    from fastsft.data.records import Problems, read_records

    return next(read_records([data], Problems("skip")), None) is not None


def bench_list(*, json: bool = False) -> None:
    """The topics of `fastsft bench`.

    Args:
        json: machine-readable output.
    """
    from fastsft.bench.tables import show_topics
    from fastsft.bench.topics import TOPICS

    if json:
        print_json({name: dataclasses.asdict(topic) for name, topic in TOPICS.items()})
    else:
        show_topics()


def bench_compare(before: Path, after: Path, /, *, threshold: float = 0.1, json: bool = False) -> None:
    """Compare two results of `fastsft bench --json`. Exits with 1 if fastsft became slower.

    Args:
        before: the older results.
        after: the newer ones.
        threshold: change of the median that counts, as a share, where the rounds' spreads do not overlap either.
        json: machine-readable output.
    """
    from fastsft.bench.compare import changes, differences
    from fastsft.bench.results import Result
    from fastsft.bench.tables import show_changes

    old, new = Result.read(before), Result.read(after)
    found, machines = changes(old, new, threshold), differences(old, new)
    missing = len(old.groups().keys() ^ new.groups().keys())
    if json:
        fields = ("group", "contestant", "times", "verdict", "rivals")
        print_json(
            {"machines": machines, "missing": missing, "changes": [{f: getattr(c, f) for f in fields} for c in found]}
        )
    else:
        show_changes(found, machines, missing)
    if any(c.verdict == "slower" for c in found):
        raise SystemExit(1)
