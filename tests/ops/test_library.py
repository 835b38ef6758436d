"""Registration of ops: what is true of all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from fastsft import ops
from fastsft.ops import _library


def test_the_tensors_device_is_current_in_a_cuda_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.Tensor] = []

    @contextlib.contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    x, y = torch.zeros(1), torch.ones(1)
    scale, tensors, device = _library.on_device(lambda scale, *tensors: (scale, tensors, current[:]))(2.0, x, y)
    assert (scale, tensors) == (2.0, (x, y))
    assert len(device) == 1
    assert device[0] is x
    assert not current


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_current() -> None:
    x, w = torch.randn(4, 64, device="cuda:1"), torch.ones(64, device="cuda:1")
    with torch.cuda.device(0):
        torch.testing.assert_close(ops.rms_norm(x, w).cpu(), ops.rms_norm(x.cpu(), w.cpu()))
        with pytest.raises((ValueError, RuntimeError)):
            ops.rms_norm(x, w.to("cuda:0"))


def test_tensors_on_meta_beside_others_are_refused() -> None:
    """torch would call the fake implementation and give memory that nobody wrote."""
    x, weight = torch.ones(4, 64), torch.ones(64, device="meta")
    for call in (lambda: ops.rms_norm(x, weight, 1e-6), lambda: ops.swiglu(x, x.to("meta")),
                 lambda: ops.linear(x, weight[None])):  # fmt: skip
        with pytest.raises(ValueError, match=r"expected all tensors on one device, got .*cpu and .*meta"):
            call()
    assert ops.rms_norm(x.to("meta"), weight, 1e-6).is_meta
