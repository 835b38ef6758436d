"""compute-sanitizer over every kernel at tiny sizes: memcheck, then racecheck of shared memory."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from typing import Any

from record import ROOT

TOOLS = ("memcheck", "racecheck")
TESTS = "tests/ops/test_kernels_cuda.py"
LONGEST, SHORTEST = 60.0, 10.0  # seconds for one tool; with less it is not begun
FINDINGS = 99  # exit status of the sanitizer

Row = dict[str, Any]


def find() -> str | None:
    """The program: on the path, or in the CUDA toolkit."""
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    path = [os.environ.get("PATH", os.defpath), *(f"{home}/bin" for home in homes if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(path))


def sanitize(seconds: float) -> list[Row]:
    """A row per tool, all in ``seconds``. ``note``: its verdict, or why there is none; ``problem``: what it found."""
    program = find()
    if program is None:
        return [{"contestant": tool, "note": "not run: compute-sanitizer was not found"} for tool in TOOLS]
    each = min(LONGEST, seconds / len(TOOLS))
    if each < SHORTEST:
        return [{"contestant": tool, "note": "not run: no time was left"} for tool in TOOLS]
    return [{"contestant": f"fastsft, {tool}", **run(program, tool, each)} for tool in TOOLS]


def run(program: str, tool: str, seconds: float) -> Row:
    # By their mangled names: torch's kernels are not ours to check, and would take minutes.
    command = [program, "--tool", tool, "--kernel-regex", "kns=fastsft", "--report-api-errors", "no"]
    command += ["--num-cuda-barriers", "64"]  # of a block; what it counts by itself overflows with Hopper's kernels
    command += ["--error-exitcode", str(FINDINGS), sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["--timeout=0", TESTS]
    # A session of its own: the sanitizer's children outlive it otherwise, and hold its output open.
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"note": f"not finished after {seconds:.0f} s"}
    said = [line.lstrip("= ") for line in output.splitlines() if line.startswith("=========")]
    verdict = next((line for line in said if "SUMMARY" in line), "no summary")
    if process.returncode == 0:
        return {"note": verdict}
    if process.returncode != FINDINGS:
        return {"problem": f"status {process.returncode}, {verdict}: {' '.join(output.split())[-300:]}"}
    first = next((line for line in said if any(word in line for word in ("Invalid", "hazard", "rror: "))), "")
    return {"problem": f"{verdict}: {first}"}
