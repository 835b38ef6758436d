"""Timing on a GPU by CUDA events, on a CPU by perf_counter through the same interface; the machine's measured limits.

Contestants take turns, so that a drift of the clocks meets them all. Before each call the L2 cache is overwritten, and
the device is given a pause in which the host gets ahead: what is timed is the device's work, with the host's part only
where the host has to wait for the device.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU
PAUSE_CYCLES = 1_000_000  # half a millisecond: longer than the host needs to launch a forward or backward pass

Run = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds."""

    median: float
    iqr: float
    repeats: int


@dataclass(frozen=True)
class Limits:
    """What the machine does at best: bytes per second read and written by a copy, bf16 operations per second."""

    copy: float
    matmul: float


class Stopwatch:
    """Times calls on one device. ``repeats``: of each contestant, after two calls to warm up."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self.cuda = device.type == "cuda"
        self._flush = torch.empty(FLUSH_BYTES if self.cuda else 0, dtype=torch.int8, device=device)

    def compare(self, contestants: dict[str, Run]) -> dict[str, Timing]:
        """One round after the other, each contestant once per round."""
        for run in contestants.values():
            for _ in range(2):
                run()
        spans: dict[str, list[Any]] = {name: [] for name in contestants}
        for _ in range(self.repeats):
            for name, run in contestants.items():
                spans[name].append(self._events(run) if self.cuda else wall_clock(run))
        if self.cuda:
            torch.cuda.synchronize()
            spans = {name: [begin.elapsed_time(end) / 1e3 for begin, end in pairs] for name, pairs in spans.items()}
        return {name: summary(seconds) for name, seconds in spans.items()}

    def _events(self, run: Run) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(PAUSE_CYCLES)
        begin.record()
        run()
        end.record()
        return begin, end

    def peak_mib(self, run: Run) -> float:
        """What a call takes at its peak beyond what is there before; 0 on a CPU. Not of a first call: that compiles."""
        if not self.cuda:
            return 0.0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def limits(self) -> Limits:
        """Measured on random data: zeros would run faster."""
        elements, side = (1 << 30, 8192) if self.cuda else (1 << 20, 256)
        source = torch.randint(-128, 128, (elements,), dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        a, b = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        product = torch.empty_like(a)
        times = self.compare({"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(a, b, out=product)})
        return Limits(copy=2 * elements / times["copy"].median, matmul=2 * side**3 / times["matmul"].median)


def wall_clock(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def summary(seconds: list[float]) -> Timing:
    low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (*seconds, *seconds, *seconds)
    return Timing(median, high - low, len(seconds))
