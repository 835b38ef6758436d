"""linear_cross_entropy and linear_logprobs against the plain formulas of ops/reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import assert_as_good_as_torch
from loss_cases import SHAPES, Case, assert_rounded_once, check, ours, plain, record_gradients

from fastsft import _C, ops
from fastsft.ops import _loss_plan, _loss_tiles, loss, reference

OPTIONS: list[dict[str, Any]] = [
    {"softcap": 4.0},
    {"temperature": 0.7},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01},
    {"softcap": 3.0, "temperature": 1.4, "label_smoothing": 0.2, "z_loss": 0.02},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_options(shape: tuple[int, int, int], options: dict[str, Any]) -> None:
    check(Case(*shape), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    check(Case(257, 64, 1031, dtype))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("upstream", [1.0, -2.5])
@pytest.mark.parametrize("objective", ["nll", "power"])
def test_reductions_and_upstream_gradient(reduction: str, upstream: float, objective: str) -> None:
    case, args = Case(31, 24, 257), {"alpha": 0.5} if objective == "power" else {}
    check(case, objective, args, reduction=reduction, upstream=upstream)


def test_upstream_gradient_per_token() -> None:
    case, upstream = Case(31, 24, 257), torch.linspace(-2, 2, 31)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    loss = ops.linear_cross_entropy(hidden, weight, case.targets, case.weights, reduction="none")
    got = torch.autograd.grad((loss * upstream).sum(), (hidden, weight))
    exact_in = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = reference.linear_cross_entropy(*exact_in, case.targets, case.weights, reduction="none")
    for a, b in zip(got, torch.autograd.grad((exact * upstream).sum(), exact_in), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_logprobs_and_entropy(softcap: float) -> None:
    case = Case(31, 24, 257)
    g = torch.Generator().manual_seed(1)
    up = torch.randn(2, 31, generator=g)
    results = []
    for dtype, function in ((torch.float32, ops.linear_logprobs), (torch.float64, reference.linear_logprobs)):
        kw: dict[str, Any] = {"return_entropy": True} if function is ops.linear_logprobs else {}
        leaves = [t.to(dtype).detach().requires_grad_() for t in (case.hidden, case.weight, case.bias)]
        logprob, entropy = function(leaves[0], leaves[1], case.targets, bias=leaves[2], softcap=softcap, **kw)
        (logprob * up[0] + entropy * up[1]).sum().backward()
        results.append([logprob.detach().double(), entropy.detach().double(), *[x.grad.double() for x in leaves]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_given_log_probabilities_have_the_gradients_of_computed_ones(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(31, 24, 257, dtype)
    upstream, values = torch.randn(2, 31, generator=torch.Generator().manual_seed(1))
    results = []
    for given in (None, values.requires_grad_()):
        leaves = [t.detach().clone().requires_grad_() for t in (case.hidden, case.weight, case.bias)]
        with monkeypatch.context() as patch:
            if given is not None:
                patch.setattr(loss, "_op", None)  # nothing is computed forward
            found = ops.linear_logprobs(*leaves[:2], case.targets, bias=leaves[2], softcap=2.0, values=given)
        (found * upstream).sum().backward()
        results.append([x.grad for x in leaves])
    assert torch.equal(found, torch.where(case.targets == -100, 0.0, values))
    assert values.grad is None
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    inputs = (case.hidden, case.weight, case.targets)
    with pytest.raises(ValueError, match=r"linear_logprobs: values: expected float32 \[31\], got torch.float32 \[30\]"):
        ops.linear_logprobs(*inputs, values=values[1:])
    with pytest.raises(ValueError, match="linear_logprobs: values: expected None beside return_entropy, got"):
        ops.linear_logprobs(*inputs, values=values, return_entropy=True)


def test_all_weights_zero() -> None:
    case = Case(9, 6, 11)
    case.weights.zero_()
    for result in ours(case, "nll", {}):
        assert torch.equal(result, torch.zeros_like(result))


def test_accumulated_micro_batches_equal_one_batch() -> None:
    case = Case(257, 19, 131)
    whole = ours(case, "nll", {})
    weight = case.weight.clone().requires_grad_()
    kept = torch.where(case.targets != -100, case.weights, 0)
    for part in torch.arange(257).split([100, 1, 156]):
        ops.linear_cross_entropy(
            case.hidden[part], weight, case.targets[part], case.weights[part], bias=case.bias, normalizer=kept.sum()
        ).backward()
    assert (weight.grad - whole[2]).norm() <= 1e-6 * whole[2].norm()  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1000, 60])
def test_accumulate_into(dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of micro-batches add up in float32, and autograd leaves the weight alone."""
    monkeypatch.setattr(_loss_plan, "FAST_BYTES", 136 * dtype.itemsize * rows)
    case = Case(257, 19, 131, dtype)
    exact = plain(case, torch.float64)
    weight, into = case.weight.clone().requires_grad_(), torch.ones(131, 19)
    kept = torch.where(case.targets != -100, case.weights, 0)
    hidden_grads = []
    for part in torch.arange(257).split([100, 1, 156]):
        hidden = case.hidden[part].requires_grad_()
        loss = ops.linear_cross_entropy(hidden, weight, case.targets[part], case.weights[part], bias=case.bias,
                                        normalizer=kept.sum(), accumulate_into=into)  # fmt: skip
        loss.backward()  # type: ignore[union-attr]
        hidden_grads.append(hidden.grad)
    assert weight.grad is None
    unit = torch.finfo(dtype).eps
    rounding = 3 * 2**-24 * into.numel() ** 0.5  # of sums that are near 1
    assert (into - 1 - exact[2]).norm() <= 4 * unit * exact[2].norm() + rounding
    assert (torch.cat(hidden_grads) - exact[1]).norm() <= 4 * unit * exact[1].norm()  # type: ignore[arg-type]
    with torch.no_grad():
        before = into.clone()
        ops.linear_cross_entropy(case.hidden, weight, case.targets, accumulate_into=into)
        assert torch.equal(into, before)


def test_float16_gradients_survive_a_large_divisor() -> None:
    """A loss scale multiplies in the backward pass; what is divided away in the forward pass must not be lost."""
    case = Case(64, 32, 300, torch.float16, positive=True)
    exact = plain(case, torch.float64, normalizer=1e6)
    got = ours(case, normalizer=1e6, upstream=65536.0)
    for a, b in zip(got[1:], exact[1:], strict=True):
        assert (a.double() / 65536 - b).norm() <= 5e-3 * b.norm()


@pytest.mark.parametrize("rows", [1000, 40])
def test_gradients_are_rounded_once(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_loss_plan, "FAST_BYTES", 136 * 2 * rows)
    case = Case(257, 19, 131, torch.bfloat16)
    recorded = record_gradients(monkeypatch, case)
    assert_rounded_once(case, ours(case), *recorded)


def test_a_nan_row_stays_in_its_row() -> None:
    case = Case(31, 24, 257)
    case.targets.clamp_(min=0)
    case.weights.fill_(1.0)
    clean = ours(case, "nll", {}, reduction="none")
    case.hidden[4] = torch.nan
    dirty = ours(case, "nll", {}, reduction="none")
    rows = torch.arange(31) != 4
    for k in (0, 1):
        assert torch.equal(dirty[k][rows], clean[k][rows])
        assert dirty[k][4].isnan().all()


def test_true_class_gradient_survives_a_confident_prediction() -> None:
    """p_y -> 1: the target's gradient p_y - 1 must not be lost to rounding in bfloat16."""
    hidden = torch.tensor([[9.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16)
    ops.linear_cross_entropy(hidden, weight, torch.tensor([0])).backward()
    exact = torch.sigmoid(torch.tensor(9.0)) - 1
    assert abs(float(hidden.grad) / float(exact) - 1) < 0.02  # type: ignore[arg-type]


def test_logits_never_exist_beyond_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.profiler import ProfilerActivity, profile

    tile = 1 << 16
    monkeypatch.setattr(_loss_plan, "FAST_BYTES", tile)
    hidden, weight = torch.randn(2048, 8, requires_grad=True), torch.randn(1024, 8, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        ops.linear_cross_entropy(hidden, weight, torch.zeros(2048, dtype=torch.int64)).backward()
    largest = max(e.cpu_memory_usage for e in record.events())
    assert largest <= 2048 * 1024 * 4 / 8, "an allocation near the size of all logits"


def test_bits_do_not_depend_on_our_threads() -> None:
    case = Case(257, 19, 131)
    results = []
    for n in (1, 3):
        _C.set_num_threads(n)
        results.append(ours(case, "nll", {}))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_instruction_sets_agree(isa: str) -> None:
    case = Case(31, 24, 257)
    exact = plain(case, torch.float64, "focal", {"gamma": 2.0})
    got = ours(case, "focal", {"gamma": 2.0})
    assert_as_good_as_torch(got, plain(case, torch.float32, "focal", {"gamma": 2.0}), exact)


def test_aux() -> None:
    case = Case(31, 24, 257)
    _, aux = ops.linear_cross_entropy(case.hidden, case.weight, case.targets, case.weights, objective="dft",
                                      return_aux=True)  # fmt: skip
    logprob, entropy = reference.linear_logprobs(case.hidden.double(), case.weight.double(), case.targets)
    kept = (case.targets != -100) & (case.weights != 0)
    torch.testing.assert_close(aux.logprob.double(), torch.where(kept, logprob, 0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(aux.entropy.double(), torch.where(kept, entropy, 0), rtol=1e-5, atol=1e-5)
    expected = torch.where(kept, case.weights.double() * logprob.exp(), 0)
    torch.testing.assert_close(aux.weight.double(), expected, rtol=1e-5, atol=1e-7)


def test_plain_torch_rows_match_the_native_ones() -> None:
    g = torch.Generator().manual_seed(0)
    logits, other, bias = torch.randn(31, 257, generator=g), torch.randn(31, 257, generator=g), torch.randn(257)
    targets, coefficients = torch.randint(257, (31,), generator=g), torch.randn(6, 31, generator=g)
    for ref in (None, other):
        for forward in (False, True):
            if ref is None:
                coefficients[4:] = 0
            results = []
            for kernels in (_loss_tiles._NATIVE, _loss_tiles._torch_kernels()):
                tile, stats = logits.clone(), torch.empty(6, 31)
                kernels.stats(tile, targets, bias, ref, 4.0, 0.8, forward, stats)
                kernels.gradient(tile, targets, bias, ref, 4.0, 0.8, stats, coefficients)
                results.append([stats, tile])
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
