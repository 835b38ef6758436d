"""linear_cross_entropy and linear_logprobs as torch and their callers see them: autograd, autocast, tracing, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import Case, ours

from fastsft import ops
from fastsft.ops import _loss_inputs, _loss_products


def test_frozen_head_and_frozen_hidden() -> None:
    case = Case(31, 24, 257)
    full = ours(case, "nll", {})
    for frozen in (0, 1):
        leaves = [case.hidden.clone(), case.weight.clone()]
        leaves[1 - frozen].requires_grad_()
        ops.linear_cross_entropy(*leaves, case.targets, case.weights, bias=case.bias).backward()
        assert leaves[frozen].grad is None
        assert torch.equal(leaves[1 - frozen].grad, full[2 - frozen])


def test_nothing_is_differentiated_without_grad_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = _loss_products.multiply
    monkeypatch.setattr(_loss_products, "multiply", lambda *a, **kw: (calls.append(1), original(*a, **kw)))
    case = Case(31, 24, 257)
    weight = case.weight.requires_grad_()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            ops.linear_cross_entropy(case.hidden, weight, case.targets)
    assert len(calls) == 2


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(reduction: str) -> None:
    """As F.linear under autocast: bfloat16 products, float32 gradients of float32 leaves."""
    case = Case(31, 24, 257)
    leaves = [case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.linear_cross_entropy(*leaves, case.targets, case.weights, reduction=reduction)
        logprob = ops.linear_logprobs(*leaves, case.targets)
    got = torch.autograd.grad(loss.sum(), leaves)  # type: ignore[union-attr]
    low = Case(31, 24, 257, torch.bfloat16)
    twins = [low.hidden.requires_grad_(), low.weight.requires_grad_()]
    same = ops.linear_cross_entropy(*twins, case.targets, case.weights, reduction=reduction)
    assert torch.equal(loss, same)  # type: ignore[arg-type]
    assert torch.equal(logprob, ops.linear_logprobs(*twins, case.targets))  # type: ignore[arg-type]
    for a, b in zip(got, torch.autograd.grad(same.sum(), twins), strict=True):  # type: ignore[union-attr]
        assert a.dtype == torch.float32
        assert torch.equal(a, b.float())


def test_opcheck() -> None:
    case = Case(17, 6, 37)
    w = torch.where(case.targets == -100, 0.0, case.weights)
    inputs = _loss_inputs.Inputs(case.hidden, case.weight, case.bias, case.targets, w, w)
    for into in (None, torch.zeros(37, 6)):
        given = inputs._replace(accumulate_into=into)
        torch.library.opcheck(torch.ops.fastsft.linear_cross_entropy.default, (*given, *_loss_inputs.Options(), 7))


def test_compile_fullgraph() -> None:
    case = Case(17, 6, 37)

    def step(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ops.linear_cross_entropy(hidden * 2, weight, case.targets, case.weights) * 3  # type: ignore[operator,return-value]

    grads = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        function(hidden, weight).backward()
        grads.append((hidden.grad, weight.grad))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_double_backward_is_refused() -> None:
    case = Case(9, 6, 11)
    hidden = case.hidden.requires_grad_()
    loss = ops.linear_cross_entropy(hidden, case.weight, case.targets)
    (grad,) = torch.autograd.grad(loss**2, hidden, create_graph=True)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


H, W, T = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.int64)
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"hidden": torch.zeros(4, 3, dtype=torch.float64)}, r"hidden: expected \[T, H\] of float32"),
    ({"weight": torch.zeros(5, 2)}, r"weight: expected torch.float32 \[V, 3\], got torch.float32 \[5, 2\]"),
    ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets: expected int64 \[4\]"),
    ({"targets": torch.full((4,), 5)}, r"targets: expected ids in \[0, 5\), got 5"),
    ({"targets": torch.full((4,), -1)}, r"targets: expected ids in \[0, 5\), got -1"),
    ({"token_weights": torch.zeros(4, dtype=torch.int64)}, r"token_weights: expected float32 \[4\]"),
    ({"bias": torch.zeros(4)}, r"bias: expected floats \[5\]"),
    ({"objective": "nl"}, "objective: expected one of nll, dft"),
    ({"objective": "focal", "objective_args": {"gama": 1.0}}, r"objective_args: expected for 'focal' only \['gamma'\]"),
    ({"objective": "k3"}, "ref_logprobs: expected a value for 'k3', got None"),
    ({"ref_logprobs": torch.zeros(4)}, "ref_logprobs: expected None for 'nll'"),
    ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens: expected None"),
    ({"objective": "asft"}, "reference: expected a value for 'asft', got None"),
    ({"reference": (H, W)}, "reference: expected None for 'nll'"),
    ({"objective": "asft", "reference": (H, W[:4])}, r"reference\[1\]: expected torch.float32 \[5, 3\]"),
    ({"objective": "iw_sequence", "ref_logprobs": torch.zeros(4)}, "cu_seqlens: expected a value for 'iw_sequence'"),
    ({"accumulate_into": torch.zeros(5, 2)}, r"accumulate_into: expected contiguous float32 \[5, 3\]"),
    ({"accumulate_into": torch.zeros(5, 3), "reduction": "none"}, "accumulate_into: expected reduction 'mean'"),
    ({"normalizer": torch.ones(2)}, r"normalizer: expected a number, got a tensor of shape \[2\]"),
    ({"weight": torch.zeros(0, 3)}, "weight: expected a vocabulary of at least 1"),
    ({"max_kept": -1}, "max_kept: expected a number of tokens, or None, got -1"),
    ({"max_kept": 3}, "max_kept: expected at least 4, the tokens with weight, got 3"),
    ({"softcap": float("nan")}, "softcap: expected a finite number"),
    ({"z_loss": float("inf")}, "z_loss: expected a finite number"),
    ({"objective": "dft", "label_smoothing": 0.1}, "label_smoothing: expected 0 for 'dft'"),
    ({"reduction": "avg"}, "reduction: expected 'mean', 'sum' or 'none', got 'avg'"),
    ({"reduction": "sum", "normalizer": 3.0}, "normalizer: expected reduction='mean'"),
    ({"temperature": 0.0}, "temperature: expected a finite number above 0"),
    ({"softcap": -1.0}, "softcap: expected a finite number of at least 0"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=lambda x: str(x)[:40] if isinstance(x, str) else "")
def test_messages(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.linear_cross_entropy(**{"hidden": H, "weight": W, "targets": T, **change})
