"""Runs files of the suite in a pytest of their own and brings back what they measured."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsft.bench.topics import Topic, suite
from fastsft.progress import Progress

QUICK = ("--benchmark-min-rounds=2", "--benchmark-max-time=0.1", "--benchmark-warmup=off")


@dataclass(frozen=True)
class Given:
    """What the user hands to the benches; see ``fastsft bench --help``."""

    data: Path | None = None
    references: tuple[Path, ...] = ()
    documents: int | None = None
    models: Path | None = None
    rivals: tuple[Path, ...] = ()
    quick: bool = False

    def environment(self) -> dict[str, str]:
        values = {
            "DATA": self.data and self.data.resolve(),
            "EVAL": ":".join(str(path.resolve()) for path in self.references),
            "DOCS": self.documents,
            "MODELS": self.models and self.models.resolve(),
            # Not resolved: a virtual environment's Python would not be its own.
            "RIVALS": ":".join(str(path.absolute()) for path in self.rivals),
            "QUICK": "1" if self.quick else "",
        }
        return {f"FASTSFT_BENCH_{name}": str(value) for name, value in values.items() if value}


@dataclass
class Measured:
    """``benchmarks``: pytest-benchmark's data; ``failed``: (case, why); ``limits``: as in results.Result.
    ``interrupted``: by the user; what was done by then is here."""

    benchmarks: list[dict[str, Any]] = field(default_factory=list)
    limits: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    interrupted: bool = False


class WrongExpression(ValueError):
    """Of the cases to run; pytest's own words."""


def has_runner() -> bool:
    return all(importlib.util.find_spec(name) for name in ("pytest", "pytest_benchmark"))


def files_of(topics: Iterable[Topic]) -> list[Path]:
    return [suite() / f"bench_{stem}.py" for topic in topics for stem in topic.benches]


def run(files: Sequence[Path], given: Given, tell: Progress, pytest_arguments: Sequence[str] = ()) -> Measured:
    """Run the files; ``tell`` hears (bench, cases done, cases) of each.

    Raises:
        WrongExpression: a ``-k`` that pytest cannot read.
        RuntimeError: pytest itself failed; its last lines.
    """
    read, write = os.pipe()
    with tempfile.TemporaryDirectory(prefix="fastsft-bench-") as folder, open(read) as events:
        data, log = Path(folder, "data.json"), Path(folder, "log")
        command = [
            sys.executable, "-m", "pytest", "-c", suite() / "pytest.ini", "--continue-on-collection-errors",
            "--benchmark-only", f"--benchmark-json={data}", *(QUICK if given.quick else ()), *pytest_arguments, *files,
        ]  # fmt: skip
        # under pytest-xdist its variables would switch the timings off
        ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment = {**ours, **given.environment(), "FASTSFT_BENCH_EVENTS": str(write)}
        with log.open("w") as output:
            process = subprocess.Popen(command, env=environment, pass_fds=[write], stdout=output, stderr=output)
        os.close(write)
        measured = Measured()
        try:
            try:
                _listen(events, tell, measured)
                code = process.wait()
            except KeyboardInterrupt:  # pytest got it as well, and writes down what it has
                measured.interrupted = True
                code = process.wait()
        finally:
            process.kill()
            process.wait()
        # 0: all passed, 1: some failed, 2: interrupted, 5: nothing to run
        if code not in (0, 1, 5) and not measured.interrupted:
            said = log.read_text(errors="replace")
            if wrong := re.search(r"^ERROR: Wrong expression passed to '-k': .*?: (at column.*)$", said, re.M):
                raise WrongExpression(wrong[1])
            raise RuntimeError(said[-3000:])
        if data.exists() and (text := data.read_text()):
            found = json.loads(text)
            measured.benchmarks, measured.limits = found["benchmarks"], found.get("limits", {})
        return measured


def _listen(events: Iterable[str], tell: Progress, measured: Measured) -> None:
    """Follow what the suite's conftest.py writes, until it ends."""
    cases: dict[str, int] = {}
    done: dict[str, int] = {}
    for line in events:
        event = json.loads(line)
        if "cases" in event:
            cases, done = event["cases"], dict.fromkeys(event["cases"], 0)
            continue
        bench, outcome = event["bench"], event["outcome"]
        if outcome == "failed":
            measured.failed.append((event["case"], event["why"]))
        if outcome in ("passed", "skipped", "failed") and bench in cases:
            done[bench] += 1
            measured.skipped += outcome == "skipped"
        if bench in cases:
            tell(bench, done[bench], cases[bench])
