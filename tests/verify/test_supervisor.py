"""The processes that run code: no run sees another, what fails is replaced, and nothing survives its owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastsft.verify import pool
from fastsft.verify.pool import POOL
from fastsft.verify.sandbox import Limits, interpreter_paths, run


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(*pids: int) -> bool:
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(alive, pids))


def idle() -> int:
    """The process that the next run will be in."""
    with POOL.lease(interpreter_paths()) as supervisor:
        return supervisor._process.pid


def test_an_interpreter_serves_many_runs_that_do_not_see_each_other() -> None:
    first = idle()
    dirty = "import builtins, math, os\nmath.pi = 3\nbuiltins.x = 1\nopen('f', 'w').close()\nos.mkdir('d')"
    assert run(dirty).status == "ok"
    result = run("import math, os\nprint(math.pi > 3.1, 'x' in dir(__builtins__), os.listdir('.'))")
    assert result.stdout == "True False []\n"
    assert idle() == first
    draws = {run("import random; print(random.random())").stdout for _ in range(3)}
    assert len(draws) == 3, "each run seeds for itself"


def test_a_supervisor_that_was_killed_is_replaced() -> None:
    os.kill(idle(), signal.SIGKILL)
    result = run("pass")
    assert (result.status, result.stderr) == ("refused", "could not start: it ended with status -9\n"[:-1])
    assert run("pass").status == "ok"


def test_one_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_START", "raise OSError('no luck')")
    assert "no luck" in run("pass").stderr


def test_a_forked_process_starts_its_own() -> None:
    own = idle()
    child = os.fork()
    if child == 0:
        os._exit(0 if run("pass").status == "ok" and idle() != own else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert run("pass").status == "ok"
    assert idle() == own


def test_many_threads() -> None:
    with ThreadPoolExecutor(6) as threads:
        results = list(threads.map(lambda i: run(f"print({i})"), range(30)))
    assert [r.stdout for r in results] == [f"{i}\n" for i in range(30)]


_OWNER = """
import sys
from fastsft.verify.pool import POOL
from fastsft.verify.sandbox import Limits, interpreter_paths, run
run("pass")
with POOL.lease(interpreter_paths()) as supervisor:
    print(supervisor._process.pid, flush=True)
run("while True: pass", limits=Limits(seconds=60))
"""


def test_nothing_survives_an_owner_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", _OWNER], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        supervisor = int(owner.stdout.readline())
        deadline = time.monotonic() + 10
        while not (children := _children(supervisor)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert children
        owner.kill()
    assert ends(supervisor, *children)


def _children(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_time_runs_out_while_others_run() -> None:
    with ThreadPoolExecutor(2) as threads:
        slow = threads.submit(run, "while True: pass", limits=Limits(seconds=0.5))
        assert run("pass").status == "ok"
        assert slow.result().status == "timeout"


def test_nothing_piles_up() -> None:
    """Neither mounts nor descriptors nor processes, whatever the runs did."""

    def held() -> tuple[int, int, int]:
        process = Path(f"/proc/{idle()}")
        mounts = (process / "mountinfo").read_text().count("\n")
        return mounts, len(list((process / "fd").iterdir())), len(_children(int(process.name)))

    run("pass")
    before = held()
    for code in ("pass", "1 / 0", "while True: pass", "while True: print(1)", "import os; os._exit(1)"):
        run(code, limits=Limits(seconds=0.2))
    assert held() == before
