"""Where rivals run: FASTSFT_BENCH_RIVALS names the Pythons of their environments, else they share ours."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

PYTHONS = os.environ.get("FASTSFT_BENCH_RIVALS", sys.executable).split(os.pathsep)


def has(python: str, modules: tuple[str, ...]) -> bool:
    look = f"import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, {modules})))"
    return subprocess.run([python, "-c", look], capture_output=True).returncode == 0


@functools.cache
def python_with(*modules: str) -> str | None:
    """The first that has them."""
    return next((python for python in PYTHONS if has(python, modules)), None)
