"""Run the benches and keep what they measure: ``python bench/record.py NAME [TOPIC ...]`` writes
bench/results/NAME/<date>.json and the texts: docs/benchmarks.md and the table in README.md from the machine with the
most rows, docs/benchmarks-NAME.md from each other one. NAME says which machine it is; nothing else about it is stored
but processor and versions. ``--render`` only writes the texts anew from the newest results, and ``--check`` ends with 1
if they differ.

The topics are those of ``fastsft bench``, all by default; ``-k`` leaves cases out, as pytest's. If only some benches
run, their groups take the place of the same ones in the newest results of that machine, and the others stay, each row
with the date and commit that it was measured at."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fastsft.bench.page import between, headlines, page
from fastsft.bench.results import Result, commit, machine, merged, summarise
from fastsft.bench.run import Given, files_of, run
from fastsft.bench.topics import TOPICS, chosen
from fastsft.progress import bars

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


def newest(name: str) -> Path | None:
    """The machine's newest results of the suite; those of a GPU have a page of their own."""
    paths = sorted((RESULTS / name).glob("[0-9]*.json"), reverse=True)
    return next((path for path in paths if '"gpu"' not in path.read_text(encoding="utf-8")), None)


def texts() -> dict[Path, str]:
    """What README.md and the pages of docs/ have to say."""
    paths = [path for folder in sorted(RESULTS.glob("*/")) if (path := newest(folder.name))]
    if not paths:
        raise SystemExit(f"no results under {RESULTS}")
    results = {path: Result.read(path) for path in paths}
    main = max(paths, key=lambda path: len(results[path].rows))
    pages = {path: "benchmarks.md" if path == main else f"benchmarks-{path.parent.name}.md" for path in paths}
    links = {path.parent.name: pages[path] for path in paths}
    readme = ROOT / "README.md"
    return {
        **{
            ROOT / "docs" / pages[path]: page(result, str(path.relative_to(ROOT)), ROOT / "bench", links)
            for path, result in results.items()
        },
        readme: between(readme.read_text(encoding="utf-8"), "benchmarks", headlines(results[main])),
    }


def stale() -> list[Path]:
    return [path for path, text in texts().items() if not path.exists() or path.read_text(encoding="utf-8") != text]


def older(name: str, here: dict[str, Any]) -> Result | None:
    """The machine's newest results, if it has some; ``here`` must be of its kind."""
    if (path := newest(name)) is None:
        return None
    found = Result.read(path)
    if any(found.machine[key] != here[key] for key in ("cpu", "isa")):
        was, now = (f"{m['cpu']} ({m['isa']})" for m in (found.machine, here))
        raise SystemExit(f"{path}: measured on {was}, and this is {now}: it needs a NAME of its own")
    return found


def record(name: str, topics: list[str], only: str | None) -> Path:
    here = machine()
    before = older(name, here)
    with bars() as tell:
        measured = run(files_of(chosen(topics or ["all"]).values()), Given(), tell, ("-k", only) if only else ())
    if measured.failed:
        raise SystemExit("\n".join(f"failed: {case}: {why}" for case, why in measured.failed))
    rows, limits = summarise(measured.benchmarks), measured.limits
    for row in rows:
        row.commit = commit(ROOT)
    if not rows:
        raise SystemExit("nothing was measured")
    if before and (topics or only):
        rows, limits = merged(before, rows), {**before.limits, **limits}
        here["threads"] = max(here["threads"], before.machine["threads"])  # the most that any row was measured with
    result = Result(rows[-1].date, here, rows, limits)
    result.write(RESULTS / name / f"{result.date}.json")
    return RESULTS / name / f"{result.date}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="folder under bench/results, e.g. epyc-avx512")
    parser.add_argument("topics", nargs="*", choices=[[], "all", *TOPICS], metavar="TOPIC")
    parser.add_argument("-k", dest="only", metavar="EXPRESSION", help="only cases whose name matches")
    parser.add_argument("--render", action="store_true", help="only write the texts anew")
    parser.add_argument("--check", action="store_true", help="whether the texts are what the newest results give")
    options = parser.parse_args()
    if options.check:
        if found := stale():
            sys.exit(f"not what the results give: {', '.join(str(p.relative_to(ROOT)) for p in found)}; "
                     "python bench/record.py --render")  # fmt: skip
        return
    if not options.render:
        if not options.name:
            parser.error("expected NAME, --render or --check")
        print(record(options.name, options.topics, options.only))
    for path, text in texts().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
