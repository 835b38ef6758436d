"""What the benches share: the limits of the machine, the short form of each, and progress for ``fastsft bench``."""

from __future__ import annotations

import collections
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from sizes import QUICK

from fastsft import _C
from fastsft.bench.limits import Limits

LIMITS = Limits()
PIPE = os.environ.pop("FASTSFT_BENCH_EVENTS", None)  # not for the benches' own processes
if PIPE:
    os.set_inheritable(int(PIPE), False)


@pytest.fixture(scope="session")
def limits() -> Limits:
    return LIMITS


@pytest.fixture(params=[1, 2])
def threads(request: Any) -> Any:
    """Of torch and of fastsft."""
    if request.param > len(os.sched_getaffinity(0)):
        pytest.skip("more threads than CPUs")
    before = torch.get_num_threads(), _C.num_threads()
    torch.set_num_threads(request.param)
    _C.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before[0])
    _C.set_num_threads(before[1])


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    """Takes seconds to gather, and says more of a machine than results have to."""
    return {}


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    output_json["limits"] = LIMITS.measured


# --- the short form: of each bench the first case with all its contestants, in few rounds ---------------------------


@pytest.hookimpl(trylast=True)  # after what -k leaves
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not QUICK:
        return
    first: dict[str, Any] = {}
    for item in list(items):
        function, _, _ = item.nodeid.partition("[")
        params = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        params.pop("contestant", None)
        if first.setdefault(function, params) != params:
            items.remove(item)


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    if QUICK:
        from pytest_benchmark.fixture import BenchmarkFixture

        pedantic = BenchmarkFixture.pedantic

        def few(self: Any, *args: Any, rounds: int = 1, **options: Any) -> Any:
            return pedantic(self, *args, rounds=min(rounds, 3), **options)

        monkeypatch.setattr(BenchmarkFixture, "pedantic", few)


# --- progress, as JSON lines to the command that started us ----------------------------------------------------------


def tell(event: dict[str, Any]) -> None:
    if PIPE:
        os.write(int(PIPE), json.dumps(event).encode() + b"\n")


def bench_of(nodeid: str) -> str:
    return Path(nodeid.partition("::")[0]).stem.removeprefix("bench_")


def pytest_collection_finish(session: pytest.Session) -> None:
    tell({"cases": collections.Counter(bench_of(item.nodeid) for item in session.items)})


def pytest_runtest_logstart(nodeid: str) -> None:
    tell({"bench": bench_of(nodeid), "case": nodeid, "outcome": "started"})


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        tell({"bench": bench_of(report.nodeid), "case": report.nodeid, "outcome": "failed", "why": why(report)})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or not report.passed:
        tell({"bench": bench_of(report.nodeid), "case": report.nodeid, "outcome": report.outcome, "why": why(report)})


def why(report: Any) -> str:
    """The line of the error."""
    lines = [x for x in report.longreprtext.splitlines() if x.startswith("E ")] or report.longreprtext.splitlines()
    return lines[-1].removeprefix("E ").strip() if lines and report.failed else ""
