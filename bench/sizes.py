"""How much the benches take on: as their environment says, less in the short form (``fastsft bench --quick``)."""

from __future__ import annotations

import os

QUICK = bool(os.environ.get("FASTSFT_BENCH_QUICK"))


def size(name: str, usual: float, quick: float) -> float:
    """The number in FASTSFT_BENCH_<name>, where there is one."""
    given = os.environ.get(f"FASTSFT_BENCH_{name}")
    return float(given) if given else quick if QUICK else usual
