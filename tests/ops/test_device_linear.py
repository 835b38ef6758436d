"""Weights on a device, run here on CPU tensors: what they stand for, and their products. The kernels for few rows are
in test_triton.py."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_good_as_torch
from samples import randn

from fastsft import ops
from fastsft.ops.device_linear import FORMATS, DeviceWeight, device_linear, device_logits, hold_weight

CPU = torch.device("cpu")


def meaning(weight: DeviceWeight) -> torch.Tensor:
    """float64 [N, K]."""
    wide = weight.widened(torch.float32).double()
    return wide * weight.scales[:, None].double() if weight.format == "int8" else wide


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 33), (40, 96), (65, 200)])
def test_weights_are_those_of_the_cpu(format: str, group: int, n: int, k: int) -> None:
    w = randn(n, k)
    w[0, :] = 0
    w[-1, -1] = 9.0
    held = hold_weight([w[: n // 2], w[n // 2 :]], format, CPU, group=group)
    expected = ops.pack_weight(w, format, group=group).dequantize()
    assert torch.equal(meaning(held).float(), expected)
    per_weight = {"float32": 4.0, "bfloat16": 2.0, "int8": 1 + 4 / k, "int4": -(-k // group) * (group / 2 + 2) / k}
    assert held.nbytes == pytest.approx(per_weight[format] * n * k)


@pytest.mark.parametrize("rows", [0, 1, 17, 100])
@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products(dtype: torch.dtype, format: str, rows: int) -> None:
    held = hold_weight([randn(65, 200)], format, CPU)
    x, bias = randn(rows, 200, seed=1, dtype=dtype), randn(65, seed=2, dtype=dtype)
    w = meaning(held)
    exact = x.double() @ w.T
    rounded = (x @ w.to(dtype).T, torch.nn.functional.linear(x, w.to(dtype), bias))
    found = (device_linear(x, held), device_linear(x, held, bias))
    assert all(f.dtype == dtype for f in found)
    assert_as_good_as_torch(found, rounded, (exact, exact + bias.double()))
    logits = torch.empty(rows, 65)
    device_logits(x, held, logits)
    assert_as_good_as_torch([logits], [rounded[0].float()], [exact])


@pytest.mark.parametrize("format", FORMATS)
def test_new_numbers_in_the_old_memory(format: str) -> None:
    held = hold_weight([randn(40, 96)], format, CPU)
    before = held.data.data_ptr(), held.scales.data_ptr()
    assert hold_weight([randn(40, 96, seed=3)], format, CPU, out=held) is held
    assert (held.data.data_ptr(), held.scales.data_ptr()) == before
    assert torch.equal(meaning(held), meaning(hold_weight([randn(40, 96, seed=3)], format, CPU)))
    with pytest.raises(ValueError, match=r"hold_weight: out: expected .* \[41, 96\], group .*, got .* \[40, 96\]"):
        hold_weight([randn(41, 96)], format, CPU, out=held)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hold_weight: format: expected one of .*, got 'int5'"):
        hold_weight([randn(4, 4)], "int5", CPU)
    with pytest.raises(ValueError, match="hold_weight: group: expected 32 or 64, got 16"):
        hold_weight([randn(4, 4)], "int4", CPU, group=16)
    with pytest.raises(ValueError, match=r"weight: expected \[N, K\] each, with one K, got \[\[4, 4\], \[4, 5\]\]"):
        hold_weight([randn(4, 4), randn(4, 5)], "int8", CPU)
    for format in ("int8", "int4"):
        for wrong in (torch.nan, torch.inf):
            with pytest.raises(ValueError, match=f"hold_weight: weight: expected finite numbers for {format}"):
                hold_weight([torch.full((4, 4), wrong)], format, CPU)
