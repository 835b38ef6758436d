"""The machine's limits: measured once for a number of threads, in the right units, and the shares of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastsft.bench import limits
from fastsft.bench.limits import Limits


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ARRAY", 4096)
    monkeypatch.setattr(limits, "SIZE", 16)
    monkeypatch.setattr(limits, "_seconds", lambda function: (function(), 2.0)[1])


def test_rates_by_threads() -> None:
    found, before = Limits(), torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert found.stream() == 4096 * 4 / 2
            assert found.copy() == 4096 * 4 / 2  # half of it read, half written
            assert found.product(torch.bfloat16) == 2 * 16**3 / 2
    finally:
        torch.set_num_threads(before)
    assert list(found.measured) == ["1", "2"]
    assert list(found.measured["1"]) == ["stream", "copy", "product bfloat16"]


def test_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Limits()
    first = found.stream()
    monkeypatch.setattr(limits, "_seconds", lambda function: 1.0)
    assert found.stream() == first


def test_shares() -> None:
    found, bench = Limits(), SimpleNamespace(stats={"median": 4.0}, extra_info={})
    found.share_bytes(bench, read=4096 * 4, copied=4096 * 2)
    found.share_flops(bench, 2 * 16**3, torch.float32)
    assert bench.extra_info == {"share_of_stream": 0.5, "share_of_copy": 0.25, "share_of_product": 0.5}
    untimed = SimpleNamespace(stats=None, extra_info={})
    found.share_bytes(untimed, read=1, copied=1)
    found.share_flops(untimed, 1, torch.float32)
    assert untimed.extra_info == {}
