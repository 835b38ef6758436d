"""Check and time the CUDA kernels against their rivals: ``python bench/gpu_check.py``; see docs/benchmarks-gpu.md.

Every case passes its correctness gate before it is timed. A rival that is not installed or fails is named and skipped.
Writes bench/results/<gpu>/<date>.json after every case; ends with status 1 if a result of ours is wrong or missing, or
compute-sanitizer finds something.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import gpu_attention
import gpu_data
import gpu_engine
import gpu_layers
import gpu_loss
import torch
from gpu_case import Case, Entry, Setting
from gpu_present import require_gpu
from gpu_sanitizer import TESTS, sanitize
from gpu_timing import Limits, Stopwatch, Timing, summary, wall_clock
from record import ROOT

from fastsft.bench.results import machine
from fastsft.gpu import gpus

ENTRIES = [
    *gpu_attention.ENTRIES,
    *gpu_loss.ENTRIES,
    *gpu_layers.ENTRIES,
    *gpu_engine.ENTRIES,
    *gpu_data.ENTRIES,
]
HOST_REPEATS = 5
SECONDS = 480  # for all: compute-sanitizer gets what the cases leave of them

Row = dict[str, Any]


def run_case(entry: Entry, setting: Setting, watch: Stopwatch, limits: Limits) -> list[Row]:
    """One row per contestant, ours first. ``error``: share of the error allowed; ``problem``: why there is no time."""
    try:
        case = entry.build(setting)
    except Exception as error:  # the other cases go on
        return [{"contestant": "fastsft", "problem": describe(error)}]
    rows: dict[str, Row] = {}
    for name, contestant in case.contestants.items():
        row = rows[name] = {"contestant": name}
        try:
            result = contestant.run()
            if contestant.judge:
                row["error"] = contestant.judge(result)
            del result
            row["extra_mib"] = watch.peak_mib(contestant.run)
        except Exception as error:
            row["problem"] = describe(error)
        if name.startswith("fastsft") and not row.get("error", 0.0) <= 1:  # NaN is wrong too
            row["problem"] = f"wrong: {row['error']:.3g} times the error allowed"
    runnable = {name: case.contestants[name] for name, row in rows.items() if "problem" not in row}
    try:
        times = watch.compare({name: c.run for name, c in runnable.items() if not c.host})
    except Exception as error:
        return [{"problem": describe(error), **row} for row in rows.values()]
    times |= {name: summary([wall_clock(c.run) for _ in range(HOST_REPEATS)]) for name, c in runnable.items() if c.host}
    ours = next(iter(case.contestants))
    for name, timing in times.items():
        rows[name] |= figures(timing, times.get(ours), case, limits if name == ours else None)
    return [*rows.values(), *({"contestant": name, "problem": reason} for name, reason in case.absent.items())]


def describe(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def figures(timing: Timing, ours: Timing | None, case: Case, limits: Limits | None) -> Row:
    """Times; how many times longer than ours; of ours, the shares of the machine's measured limits."""
    row: Row = {"median": timing.median, "iqr": timing.iqr, "repeats": timing.repeats}
    if ours:
        row["times_ours"] = timing.median / ours.median
    if limits and case.flops:
        row |= {"flops_per_s": case.flops / timing.median, "of_matmul": case.flops / timing.median / limits.matmul}
    if limits and case.moved:
        row |= {"bytes_per_s": case.moved / timing.median, "of_copy": case.moved / timing.median / limits.copy}
    return row


# --- what is printed and kept -----------------------------------------------------------------------------------------

HEADER = f"{'':44} {'ms':>9} {'+-':>8} {'/ ours':>7} {'limit':>12} {'error':>6} {'MiB':>7}"


def line(row: Row) -> str:
    name = f"  {row['contestant']}"
    if "problem" in row:
        return f"{name:44} {row['problem']}"
    if "note" in row:
        return f"{name:44} {row['note']}"
    shares = [f"{row[key]:.0%} {key[3:]}" for key in ("of_matmul", "of_copy") if key in row]
    ratio = f"{row['times_ours']:.2f}" if "times_ours" in row else ""
    error = f"{row['error']:.2f}" if "error" in row else ""
    return (
        f"{name:44} {row['median'] * 1e3:9.3f} {row['iqr'] * 1e3:8.3f} {ratio:>7} "
        f"{' '.join(shares):>12} {error:>6} {row['extra_mib']:7.0f}"
    )


def describe_machine(device: torch.device) -> dict[str, Any]:
    found = machine()
    if device.type == "cuda":
        index = torch.cuda.current_device()
        found["gpu"] = {"name": torch.cuda.get_device_name(index), "cuda": torch.version.cuda}
        try:
            found["gpu"] |= gpus()[index]
        except RuntimeError as error:
            print(f"GPU not described: {error}")
    return found


def results_path(gpu: str, date: str) -> Path:
    return ROOT / "bench" / "results" / re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") / f"{date}.json"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=sorted({e.group for e in ENTRIES}), help="may be repeated")
    parser.add_argument("--quick", action="store_true", help="the main cases only, half the repeats")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: tiny sizes, to test the cases")
    parser.add_argument("--json", type=Path, help="where to write; bench/results/<gpu>/<date>.json when not given")
    parser.add_argument("--limit", type=float, default=420, metavar="SECONDS", help="start no case after that")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.device == "cuda":
        require_gpu()
    start = time.perf_counter()
    device = torch.device(options.device)
    setting = Setting(device, small=device.type == "cpu")
    watch = Stopwatch(device, 3 if setting.small else 10 if options.quick else 20)
    limits = watch.limits()
    date = datetime.date.today().isoformat()
    result: dict[str, Any] = {"date": date, "machine": describe_machine(device), "limits": dataclasses.asdict(limits)}
    path = options.json
    if path is None and setting.cuda:
        path = results_path(result["machine"]["gpu"]["name"], date)
    rows: list[Row] = []

    def keep(title: str, found: list[Row]) -> None:
        print("\n".join([title, *map(line, found)]), flush=True)
        rows.extend({"group": title, **row} for row in found)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")

    peak = result["machine"].get("gpu", {}).get("memory_gbytes_per_s")
    share = f" of the memory's {peak:,}" if peak else ""
    print(
        f"copy {limits.copy / 1e9:,.0f}{share} GB/s, bf16 matmul {limits.matmul / 1e12:,.1f} TFLOP/s\n{HEADER}",
        flush=True,
    )
    for entry in ENTRIES:
        if (options.only and entry.group not in options.only) or (options.quick and not entry.quick):
            continue
        title = f"{entry.group}: {entry.name}"
        if time.perf_counter() - start > options.limit:
            found: list[Row] = [{"contestant": "fastsft", "problem": f"not run: {options.limit:.0f} s are over"}]
        else:
            found = run_case(entry, setting, watch, limits)
        keep(title, found)
        gc.collect()
        if setting.cuda:
            torch.cuda.empty_cache()
    if setting.cuda and not options.only:
        keep(f"compute-sanitizer: {TESTS}", sanitize(SECONDS - (time.perf_counter() - start)))
    print(f"{time.perf_counter() - start:.0f} s" + (f", {path}" if path else ""))
    return int(any("problem" in row for row in rows if row["contestant"].startswith("fastsft")))


if __name__ == "__main__":
    sys.exit(main())
