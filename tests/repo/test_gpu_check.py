"""bench/gpu_check.py: every case at a tiny size on the CPU; only the CUDA events themselves are left out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu_check.py"


def run(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(["-c", code] if code else [str(SCRIPT)]), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def test_every_case_runs_and_passes_its_gate(tmp_path: Path) -> None:
    path = tmp_path / "results" / "small.json"
    done = run("--device", "cpu", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    assert result["limits"]["copy"] > 0
    groups = {row["group"].partition(":")[0] for row in result["rows"]}
    assert groups == {"attention", "decode", "loss", "layers", "engine", "minhash"}
    for row in result["rows"]:
        if row["contestant"].startswith("fastsft"):
            assert row["median"] > 0, row
            assert row.get("error", 0) <= 1, row
        elif "problem" in row:
            assert row["problem"] in ("needs CUDA", "not installed"), row


WRONG = """
import sys
sys.path.insert(0, "bench")
import gpu_loss, gpu_check
right = gpu_loss.ours
gpu_loss.ours = lambda **options: lambda head: right(**options)(head) * 1.1
sys.exit(gpu_check.main(sys.argv[1:]))
"""


def test_a_wrong_result_is_not_timed(tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    done = run("--device", "cpu", "--only", "loss", "--json", str(path), code=WRONG)
    assert done.returncode == 1, done.stdout + done.stderr
    row = next(row for row in json.loads(path.read_text())["rows"] if row["contestant"] == "fastsft")
    assert row["problem"].startswith("wrong: ")
    assert "median" not in row


CLEAN = "echo '========= ERROR SUMMARY: 0 errors'"
FOUND = "echo '========= Invalid __shared__ read of size 4'; echo '========= ERROR SUMMARY: 1 error'; exit 99"
LATE = "sleep 60 & wait"


@pytest.mark.parametrize(
    ("script", "seconds", "row"),
    [
        (CLEAN, 30, {"contestant": "fastsft, memcheck", "note": "ERROR SUMMARY: 0 errors"}),
        (
            FOUND,
            30,
            {
                "contestant": "fastsft, memcheck",
                "problem": "ERROR SUMMARY: 1 error: Invalid __shared__ read of size 4",
            },
        ),
        ("exit 3", 30, {"contestant": "fastsft, memcheck", "problem": "status 3, no summary: "}),
        (LATE, 2, {"contestant": "fastsft, memcheck", "note": "not finished after 1 s"}),
        (CLEAN, 1, {"contestant": "memcheck", "note": "not run: no time was left"}),
        (None, 30, {"contestant": "memcheck", "note": "not run: compute-sanitizer was not found"}),
    ],
)
def test_sanitizer_rows(tmp_path: Path, script: str | None, seconds: int, row: dict[str, str]) -> None:
    """A stand-in for compute-sanitizer, which needs a GPU."""
    if script is not None:
        program = tmp_path / "compute-sanitizer"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    code = f"""
import json, shutil, sys
sys.path.insert(0, "bench")
import gpu_sanitizer
gpu_sanitizer.SHORTEST = 0.9
which = shutil.which
gpu_sanitizer.shutil.which = lambda name, path: which(name, path={str(tmp_path)!r})
print(json.dumps(gpu_sanitizer.sanitize({seconds})))
"""
    done = run(code=code)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert rows[0] == row
    assert [r["contestant"].rpartition(" ")[2] for r in rows] == ["memcheck", "racecheck"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["gpu_check.py", "gpu_present.py"])
def test_without_a_gpu_it_says_so(script: str) -> None:
    done = subprocess.run([sys.executable, str(ROOT / "bench" / script)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("no usable GPU: torch ")
