"""Quantised products and draws on a GPU: the Triton kernels against plain torch there, and against the CPU's draws."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_good_as_torch
from samples import randn

from fastsft import ops
from fastsft.ops.device_linear import device_linear, device_logits, hold_weight

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "k", "n"), [(1, 1536, 2048), (8, 8960, 1536), (17, 700, 33), (64, 896, 4864), (0, 64, 5)]
)
@pytest.mark.parametrize(("format", "group"), [("int8", 32), ("int4", 32), ("int4", 64)])
def test_products(format: str, group: int, rows: int, k: int, n: int, dtype: torch.dtype) -> None:
    held = hold_weight([randn(n, k)], format, DEVICE, group=group)
    w = held.widened(dtype)
    if format == "int8":
        w = (w.float() * held.scales[:, None]).to(dtype)
    x, bias = randn(rows, k, seed=1, dtype=dtype).to(DEVICE), randn(n, seed=2, dtype=dtype).to(DEVICE)
    meant = held.widened(torch.float64 if format == "int8" else dtype).double()
    exact = x.double() @ (meant * held.scales[:, None].double() if format == "int8" else meant).T
    found, again = device_linear(x, held, bias), device_linear(x, held, bias)
    assert torch.equal(found, again), "two runs differ"
    logits = torch.empty(rows, n, device=DEVICE)
    device_logits(x, held, logits)
    plain = torch.nn.functional.linear(x, w, bias), torch.nn.functional.linear(x, w).float()
    assert_as_good_as_torch((found, logits), plain, (exact + bias.double(), exact))


@pytest.mark.parametrize("vocab", [1, 17, 5000, 151_936])
def test_draws_are_the_cpu_s(vocab: int) -> None:
    """Their noise differs in last bits alone: of thousands of draws none should turn on them here."""
    rows = 64
    logits = randn(rows, vocab) * 3
    parameters = {
        "temperature": (torch.arange(rows) % 4).float() / 2,
        "top_k": (torch.arange(rows) % 3 * 20).int(),
        "top_p": torch.where(torch.arange(rows) % 5 == 0, 0.9, 1.0),
        "min_p": torch.where(torch.arange(rows) % 7 == 0, 0.05, 0.0),
        "seeds": torch.arange(rows) * 7919,
        "positions": torch.arange(rows) + (1 << 33),
    }
    ids, logprobs = ops.sample(logits, **parameters)
    their_ids, their_logprobs = ops.sample(logits.to(DEVICE), **parameters)
    assert torch.equal(their_ids.cpu(), ids)
    torch.testing.assert_close(their_logprobs.cpu(), logprobs, rtol=1e-5, atol=1e-5)


def test_a_row_without_a_token() -> None:
    logits = torch.zeros(2, 9)
    logits[1] = -torch.inf
    none = {"top_k": torch.zeros(2).int(), "top_p": torch.ones(2), "min_p": torch.zeros(2)}
    for device in ("cpu", DEVICE):
        with pytest.raises(ValueError, match="row 1"):
            ops.sample(
                logits.to(device), temperature=torch.ones(2), seeds=torch.zeros(2).long(),
                positions=torch.zeros(2).long(), **none,
            )  # fmt: skip
