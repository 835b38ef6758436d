"""Run the benches and keep what matters: ``python bench/record.py NAME`` writes bench/results/NAME/<date>.json and
docs/benchmarks.md. NAME says which machine it is; nothing else about it is stored but processor and versions.

Whatever follows goes to pytest. With ``-k`` only some benches run: their groups take the place of the same ones in the
newest results of that machine, and the others stay, each row with the date and commit that it was measured at."""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RATES = ("documents_per_second", "tokens_per_second")


def run(extra: list[str]) -> list[dict[str, Any]]:
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", f"--benchmark-json={file.name}", *extra]
        subprocess.run(command, cwd=ROOT, check=True)
        return list(json.loads(Path(file.name).read_text())["benchmarks"])


def summarise(benchmarks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per contestant: seconds and their spread."""
    rows = []
    for b in benchmarks:
        contestant = str((b["params"] or {}).get("contestant", b["name"]))
        stats = b["stats"]
        rows.append(
            {"group": b["group"], "contestant": contestant, "median": stats["median"], "iqr": stats["iqr"],
             "rounds": stats["rounds"], "extra": b["extra_info"]}
        )  # fmt: skip
    return rows


def compare(rows: list[dict[str, Any]]) -> None:
    """How many times longer than fastsft each contestant took in the same group: for as much work, where the slow ones
    got less of it and say how much they did in a second."""
    ours = {r["group"]: r for r in rows if r["contestant"] == "fastsft"}
    for row in rows:
        if own := ours.get(row["group"]):
            rate = next((k for k in RATES if k in own["extra"] and k in row["extra"]), None)
            times = own["extra"][rate] / row["extra"][rate] if rate else row["median"] / own["median"]
            row["times_ours"] = times


def merged(older: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    fresh = {row["group"] for row in rows}
    kept = [{"date": older["date"], **row} for row in older["rows"] if row["group"] not in fresh]
    return kept + rows


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def machine() -> dict[str, Any]:
    import platform

    import torch

    import fastsft

    found = fastsft.info()
    model = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), "?: ?")
    return {
        "cpu": model.partition(":")[2].strip(),
        "architecture": platform.machine(),
        "isa": found["cpu"]["isa_active"],
        "threads": found["cpu"]["threads"],
        "torch_threads": torch.get_num_threads(),
        "versions": {"fastsft": found["fastsft"], "python": found["python"], "torch": found["packages"]["torch"]},
    }


def render(result: dict[str, Any]) -> str:
    m = result["machine"]
    lines = [
        "# Benchmarks",
        "",
        f"{m['cpu']} ({m['isa']}), {m['threads']} threads, torch {m['versions']['torch']}, {result['date']}. Medians.",
        "The fourth column is the time relative to fastsft's in the same process on the same inputs (for as much work,",
        "where a slow rival got fewer of them): below 1 we lose.",
        "Every bench checks that the results agree before it times them. Single rows vary by tens of percent on a",
        "shared machine, so read ratios. Written by `python bench/record.py`.",
        "",
        "`pip install -e '.[rivals]'` installs the rivals (`gpu-rivals` those of `make gpu-check`); what is not",
        "installed is left out. text-dedup and datatrove need an environment of their own, as the other engines do:",
        "see `bench/bench_dedup_files.py` and `bench/bench_engine.py`.",
        "",
    ]
    for group in dict.fromkeys(r["group"] for r in result["rows"]):
        lines += [
            f"## {group}",
            "",
            "| | median | interquartile range | relative to fastsft | |",
            "|---|---|---|---|---|",
        ]
        for r in (r for r in result["rows"] if r["group"] == group):
            ratio = f"{r['times_ours']:.2f}" if "times_ours" in r else ""
            notes = ", ".join(_note(key, value) for key, value in r["extra"].items())
            spread = _time(r["iqr"])
            lines.append(f"| {r['contestant']} | {_time(r['median'])} | {spread} | {ratio} | {notes} |")
        lines.append("")
    return "\n".join(lines)


def _note(key: str, value: Any) -> str:
    if isinstance(value, dict):  # one figure per contestant
        value = ", ".join(_note(*item) for item in value.items())
        return f"{key.replace('_', ' ')}: {value}"
    return f"{key.replace('_', ' ')} {value:,.4g}"


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="folder under bench/results, e.g. epyc-avx512")
    options, extra = parser.parse_known_args()
    today = datetime.date.today().isoformat()
    rows = [{**row, "date": today, "commit": commit()} for row in summarise(run(extra))]
    folder = ROOT / "bench" / "results" / options.name
    folder.mkdir(parents=True, exist_ok=True)
    if "-k" in extra and (older := sorted(folder.glob("[0-9]*.json"))):
        rows = merged(json.loads(older[-1].read_text()), rows)
    compare(rows)
    result = {"date": today, "machine": machine(), "rows": rows}
    path = folder / f"{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    (ROOT / "docs" / "benchmarks.md").write_text(render(result))
    print(path)


if __name__ == "__main__":
    main()
