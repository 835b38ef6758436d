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
    assert groups == {"attention", "decode", "loss", "layers", "minhash"}
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["gpu_check.py", "gpu_present.py"])
def test_without_a_gpu_it_says_so(script: str) -> None:
    done = subprocess.run([sys.executable, str(ROOT / "bench" / script)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("no usable GPU: torch ")
