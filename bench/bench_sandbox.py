"""Tests of generated code per second: the sandbox against what others do for each test, none of which isolates it.

- ``interpreter``: ``python -I -S -c`` anew, the floor of every harness that starts one per test;
- ``fork``: this process forked, as human-eval and evalplus do (``multiprocessing``), with torch loaded in it.

``extra_info`` has runs per second. The gate: all tell a right answer from a wrong one.
"""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from typing import Any

import pytest
import torch  # noqa: F401  what the process of a harness has in memory when it forks

from fastsft.verify.sandbox import run

RIGHT, WRONG = ("import re, json, math\ndef f(x):\n    return x + 1", "def f(x):\n    return x")
CHECK = "assert f(1) == 2"


def sandbox(code: str) -> bool:
    return run(code, check=CHECK).status == "ok"


def interpreter(code: str) -> bool:
    command = [sys.executable, "-I", "-S", "-c", f"{code}\n{CHECK}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _executed(code: str, verdict: Any) -> None:
    try:
        exec(f"{code}\n{CHECK}", {})
        verdict.value = 1
    except BaseException:
        verdict.value = 0


def fork(code: str) -> bool:
    context = multiprocessing.get_context("fork")
    verdict = context.Value("i", 0)
    process = context.Process(target=_executed, args=(code, verdict))
    process.start()
    process.join()
    return bool(verdict.value)


CONTESTANTS = {"fastsft": sandbox, "interpreter": interpreter, "fork": fork}


@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_one_test_of_an_answer(benchmark: Any, contestant: str) -> None:
    judge = CONTESTANTS[contestant]
    assert judge(RIGHT)
    assert not judge(WRONG)
    benchmark.group = "tests of generated code, one at a time"
    benchmark.pedantic(judge, (RIGHT,), rounds=60)
    benchmark.extra_info["runs_per_second"] = 1 / benchmark.stats["median"]
