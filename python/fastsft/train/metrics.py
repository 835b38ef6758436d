"""What a run reports: one JSON line per step in metrics.jsonl, and a progress bar (or lines) on the terminal."""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import orjson

from fastsft.train.trackers import Trackers


class MetricsLog:
    """metrics.jsonl of a run. After a resume it holds each step once: lines past the resumed step are dropped."""

    def __init__(self, path: Path, *, resumed_step: int, trackers: Trackers | None = None) -> None:
        self.path = path
        self._trackers = trackers
        kept = [line for line in _whole_lines(path) if _step_of(line) <= resumed_step] if resumed_step else []
        stage = path.with_name(f".{path.name}.tmp")
        stage.write_bytes(b"".join(kept))
        stage.replace(path)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (lives as long as the run)

    def write(self, kind: str, step: int, **values: Any) -> None:
        self._file.write(orjson.dumps({"kind": kind, "step": step, **values}) + b"\n")
        if self._trackers:
            self._trackers.write(kind, step, values)

    def close(self) -> None:
        self._file.close()
        if self._trackers:
            self._trackers.close()


class NoLog(MetricsLog):
    """Of a process that writes nothing."""

    def __init__(self) -> None:
        pass

    def write(self, kind: str, step: int, **values: Any) -> None:
        pass

    def close(self) -> None:
        pass


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a half-written last one (of a killed run) is left out."""
    return [json.loads(line) for line in _whole_lines(Path(path))]


def _whole_lines(path: Path) -> list[bytes]:
    if not path.exists():
        return []
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _step_of(line: bytes) -> int:
    return int(json.loads(line)["step"])


class Display:
    """Progress of a run: a rich bar on a terminal, otherwise a line every ten seconds; nothing unless ``enabled``."""

    def __init__(self, total: int, start: int, *, enabled: bool) -> None:
        self._total, self._start, self._last = total, start, 0.0
        self._began = time.monotonic()
        self._live = enabled and sys.stderr.isatty()
        self._lines = enabled and not self._live
        if self._live:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}  {task.fields[rate]:,.0f} tok/s  MFU {task.fields[mfu]:.0%}  ETA"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=total, completed=start, loss="-", rate=0.0, mfu=0.0)
            self._bar.start()

    def update(self, step: int, loss: float, tokens_per_second: float, mfu: float) -> None:
        """``mfu``: the arithmetic that the step needs, as a part of what the machine's matrix product does at best."""
        if self._live:
            self._bar.update(self._task, completed=step, loss=f"{loss:.3f}", rate=tokens_per_second, mfu=mfu)
        elif self._lines and (time.monotonic() - self._last >= 10 or step == self._total):
            self._last = time.monotonic()
            left = (self._last - self._began) / max(step - self._start, 1) * (self._total - step)
            self._say(
                f"step {step}/{self._total}  loss {loss:.3f}  {tokens_per_second:,.0f} tok/s  MFU {mfu:.0%}  "
                f"ETA {datetime.timedelta(seconds=round(left))}"
            )

    def expect(self, total: int) -> None:
        """Another number of steps in all than was known before."""
        self._total = total
        if self._live:
            self._bar.update(self._task, total=total)

    def note(self, text: str) -> None:
        if self._live:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)  # a sample may be "[/b]"
        elif self._lines:
            self._say(text)

    def close(self) -> None:
        if self._live:
            self._bar.stop()

    @staticmethod
    def _say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)
