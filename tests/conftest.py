"""Two torch threads unless the environment says otherwise: the suite is sized for a two-core machine. Under
pytest-xdist (`make test`) there is a process per core, each with one torch thread; the native pool keeps its number.
Tests marked gpu are skipped without a CUDA device."""

from __future__ import annotations

import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start, too: their sums are compared with ours
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
