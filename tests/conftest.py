"""Two torch threads unless the environment says otherwise: the suite is sized for a two-core machine. Under
pytest-xdist (`make test`) there is a process per core, each with one torch thread; the native pool keeps its number.
Tests marked gpu are skipped without a CUDA device."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start, too: their sums are compared with ours
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(autouse=True, scope="module")
def what_lives_on() -> Iterator[None]:
    """Imported modules and the like, half a million objects, are passed over by full collections: each training run
    makes one."""
    gc.freeze()
    yield
    gc.collect()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
