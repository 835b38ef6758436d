"""Weights on a device, run here on CPU tensors: what they stand for, and their products. The kernels for few rows are
in test_triton.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import assert_as_good_as_torch
from samples import randn
from torch.utils._python_dispatch import TorchDispatchMode

import fastsft.ops.device_linear as device_linear_module
from fastsft import ops
from fastsft.ops import _loss_products
from fastsft.ops.device_linear import (
    FORMATS,
    DeviceWeight,
    device_linear,
    device_logits,
    hold_weight,
    widened_product,
)

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


class Sizes(TorchDispatchMode):
    """The greatest tensor that an op makes, in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not function.is_view:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize(("rows", "n"), [(70, 1300), (300, 700)], ids=["wide weight", "many rows"])
def test_widening_takes_the_memory_of_a_tile(rows: int, n: int, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And has the numbers of one product."""
    w, x, bias = randn(n, 96), randn(rows, 96, seed=1), randn(n, seed=2)
    whole, expected = hold_weight([w[:5], w[5:]], format, CPU), torch.empty(rows, n)
    widened_product(x, whole.data, whole.scales, whole.group, bias, expected)
    monkeypatch.setattr(device_linear_module, "_TILE", max(rows, 96) * 256)
    out, held = torch.empty(rows, n), hold_weight([randn(n, 96, seed=3)], format, CPU)
    with Sizes() as sizes:
        hold_weight([w[:5], w[5:]], format, CPU, out=held)
        widened_product(x, held.data, held.scales, held.group, bias, out)
    assert sizes.largest <= max(rows, 96) * 256
    assert torch.equal(held.data, whole.data)
    assert torch.equal(held.scales, whole.scales)
    torch.testing.assert_close(out, expected)


class OnDevice(torch.Tensor):
    """Takes the ways of a GPU, on the CPU."""

    is_cuda = True  # type: ignore[assignment]


@pytest.mark.parametrize("format", ["bfloat16", "int8", "int4"])
def test_logits_are_not_rounded_where_torch_rounds_products(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with torch before 2.8 on a GPU."""
    for module in (device_linear_module, _loss_products):
        monkeypatch.setattr(module, "HAS_WIDE_RESULTS", False)
    held, x = hold_weight([randn(300, 96)], format, CPU), randn(100, 96, seed=1, dtype=torch.bfloat16)
    w = held.widened(torch.bfloat16).double() * (held.scales.double()[:, None] if format == "int8" else 1)
    logits, exact = torch.empty(100, 300), x.double() @ w.T
    monkeypatch.setattr(device_linear_module, "_TILE", 96 * 256)
    device_logits(x.as_subclass(OnDevice), held, logits)
    assert (logits - exact).norm() < 0.01 * (exact.bfloat16() - exact).norm()


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
