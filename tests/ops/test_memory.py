"""What the package does to the process's memory, measured from outside of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_STEPS = """
import resource, torch
from fastsft import _C
assert _C.keep_freed_memory() in (True, False)
def step():
    x = torch.ones(64 << 20, dtype=torch.uint8)
    return x.numel()
for _ in range(30): step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10): step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not Path("/lib64/ld-linux-x86-64.so.2").exists(), reason="of the GNU C library")
def test_freed_memory_is_used_again() -> None:
    """Once the C library has seen what a step needs, further buffers of 64 MiB fault no page in."""
    done = subprocess.run([sys.executable, "-c", _STEPS], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) < 1000, f"{done.stdout} page faults, of 163,840 pages"
