"""Every objective of linear_cross_entropy against autograd on its float64 formula, and their known relations."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from loss_cases import CASES, IDS, OF_SEQUENCES, SHAPES, Case, check, ours, plain, positive

from fastsft import ops
from fastsft.ops import _loss_plan, _loss_products, objectives, reference


def test_the_list_is_complete() -> None:
    assert {name for name, _ in CASES} == set(objectives.OBJECTIVES)


@pytest.mark.parametrize(("objective", "args"), CASES, ids=IDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_autograd(shape: tuple[int, int, int], objective: str, args: dict[str, Any]) -> None:
    check(Case(*shape, positive=positive(objective, args)), objective, args)


@pytest.mark.parametrize(("objective", "args"), CASES, ids=IDS)
def test_with_cap_temperature_and_z_loss(objective: str, args: dict[str, Any]) -> None:
    case = Case(31, 24, 257, positive=positive(objective, args))
    check(case, objective, args, softcap=4.0, temperature=1.3, z_loss=0.01)


@pytest.mark.parametrize(("objective", "args"), CASES, ids=IDS)
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_tiles_do_not_change_the_result(
    rows: int, objective: str, args: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences longer than a tile, and tiles that hold several."""
    case = Case(101, 19, 131, positive=positive(objective, args))
    whole = ours(case, objective, args)
    heads = 2 if objective == "asft" else 1
    monkeypatch.setattr(_loss_plan, "FAST_BYTES", 136 * 4 * rows * heads)
    for a, b in zip(ours(case, objective, args), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("objective", "args"), CASES, ids=IDS)
def test_reduction_none(objective: str, args: dict[str, Any]) -> None:
    case = Case(31, 24, 257)
    if args.get("level") == "sequence":
        with pytest.raises(ValueError, match="reduction: expected 'mean' or 'sum' for one loss per sequence"):
            ours(case, objective, args, reduction="none")
    else:
        check(case, objective, args, reduction="none", upstream=-1.5)


@pytest.mark.parametrize(("objective", "args"), OF_SEQUENCES, ids=lambda x: str(x))
def test_packed_equals_one_sequence_at_a_time(objective: str, args: dict[str, Any]) -> None:
    case = Case(101, 19, 131, positive=True)
    case.targets.clamp_(min=0)
    case.weights.fill_(1.0)
    kw: dict[str, Any] = {"objective": objective, "objective_args": args, "reduction": "sum"}
    hidden = case.hidden.requires_grad_()
    packed = ops.linear_cross_entropy(
        hidden, case.weight, case.targets, ref_logprobs=case.ref, cu_seqlens=case.cu_seqlens, **kw
    )
    (gradient,) = torch.autograd.grad(packed, hidden)  # type: ignore[arg-type]
    total = 0.0
    for a, b in itertools.pairwise(case.cu_seqlens.tolist()):
        part = hidden[a:b].detach().requires_grad_()
        alone = torch.tensor([0, b - a], dtype=torch.int32)
        loss = ops.linear_cross_entropy(
            part, case.weight, case.targets[a:b], ref_logprobs=case.ref[a:b], cu_seqlens=alone, **kw
        )
        total += float(loss.detach())  # type: ignore[union-attr]
        (one,) = torch.autograd.grad(loss, part)  # type: ignore[arg-type]
        torch.testing.assert_close(gradient[a:b], one, rtol=1e-5, atol=1e-6)
    assert total == pytest.approx(float(packed.detach()), rel=1e-6)  # type: ignore[union-attr]


def test_pear_by_hand() -> None:
    """Four tokens whose log-ratios are 0.1, 0.2, -0.05 and 0.3: the weights that the paper's formula gives."""
    case = Case(4, 6, 11)
    case.targets = torch.tensor([3, 0, 7, 7])
    logprob = ops.linear_logprobs(case.hidden, case.weight, case.targets)
    ref = logprob - torch.tensor([0.1, 0.2, -0.05, 0.3])
    expected = {
        "pear_token": [0.9**3 * 2.718281828**0.45, 0.9**2 * 2.718281828**0.25, 0.9 * 2.718281828**0.3, 1.0],
        "pear_block": [0.9**2 * 2.718281828**0.25, 0.9**2 * 2.718281828**0.25, 1.0, 1.0],
        "pear_sequence": [2.718281828**0.55] * 4,
    }
    for name, weights in expected.items():
        args = {} if name == "pear_sequence" else {"gamma": 0.9}
        args |= {"block": 2} if name == "pear_block" else {}
        _, aux = ops.linear_cross_entropy(
            case.hidden, case.weight, case.targets, objective=name, objective_args=args, ref_logprobs=ref,
            cu_seqlens=torch.tensor([0, 4], dtype=torch.int32), return_aux=True,
        )  # fmt: skip
        torch.testing.assert_close(aux.weight, torch.tensor(weights), rtol=1e-5, atol=0)


def test_a_nan_stays_in_its_sequence() -> None:
    case = Case(101, 19, 131)
    case.targets.clamp_(min=0)
    case.weights.fill_(1.0)
    a, b = case.cu_seqlens.tolist()[2:4]
    assert b > a
    clean = ours(case, "pear_token", reduction="none")
    case.hidden[b - 1] = torch.nan
    dirty = ours(case, "pear_token", reduction="none")
    outside = (torch.arange(101) < a) | (torch.arange(101) >= b)
    for k in (0, 1):
        assert torch.equal(dirty[k][outside], clean[k][outside])
    assert dirty[0][a:b].isnan().all()


@pytest.mark.parametrize("objective", ["power", "ratio_clip", "k3", "hpt", "f_divergence", "asft"])
def test_live_weights_against_finite_differences(objective: str) -> None:
    """The gradient of what the loss reports, where the weight is not detached."""
    case = Case(5, 6, 9, seed=3)
    case.weights.fill_(1.0)
    # asft detaches p_y in its first term: what is left is the divergence
    given = {"f_divergence": {"f": "hellinger", "level": "sequence"}, "asft": {"lam": 1e4}}.get(objective, {})
    inputs = case.inputs(objective, given)
    complete = objectives.named(objective, objectives.numbers(objective, given))
    wide = {k: tuple(t.double() for t in v) if isinstance(v, tuple) else v for k, v in inputs.items()}
    weight = case.weight.double()

    def value(hidden: torch.Tensor) -> float:
        kw: dict[str, Any] = {"objective": objective, "objective_args": complete, **wide}
        return float(reference.linear_cross_entropy(hidden, weight, case.targets, **kw))

    hidden = case.hidden.requires_grad_()
    loss = ops.linear_cross_entropy(
        hidden, case.weight, case.targets, objective=objective, objective_args=given, **inputs
    )
    loss.backward()  # type: ignore[union-attr]
    scale = 1e4 if objective == "asft" else 1.0
    for i in range(case.hidden.numel()):
        step = torch.zeros(case.hidden.numel(), dtype=torch.float64)
        step[i] = 1e-6
        step = step.view_as(case.hidden)
        slope = (value(hidden.detach().double() + step) - value(hidden.detach().double() - step)) / 2e-6
        assert abs(slope - float(hidden.grad.view(-1)[i])) < 2e-5 * scale  # type: ignore[union-attr]


def test_relations_between_objectives() -> None:
    case = Case(31, 24, 257)
    nll = ours(case, "nll")
    for name, args in (("focal", {"gamma": 0.0}), ("threshold", {"tau": 0.0}), ("k3", {"beta": 0.0}),
                       ("iw_sequence", {"low": 1.0, "high": 1.0})):  # fmt: skip
        for a, b in zip(ours(case, name, args), nll, strict=True):
            torch.testing.assert_close(a, b)
    for a, b in zip(ours(case, "pear_block", {"block": 1}), ours(case, "pear_token"), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(ours(case, "asft", {"lam": 0.0}), ours(case, "dft"), strict=True):
        torch.testing.assert_close(a, b)


def test_ratio_of_one_is_on_policy() -> None:
    """With r = l the ratio objectives have the gradient of nll."""
    case = Case(31, 24, 257, positive=True)
    case.ref = reference.linear_logprobs(case.hidden, case.weight, case.targets, bias=case.bias)[0]
    nll = ours(case, "nll")
    for name in ("ratio_clip", "hpt", "k3", "f_divergence", "pear_sequence", "iw_sequence"):
        for a, b in zip(ours(case, name)[1:], nll[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_objective_costs_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three products each; four where a sequence is longer than a tile and its weight needs all of it."""
    calls = []
    original = _loss_products.multiply
    monkeypatch.setattr(_loss_products, "multiply", lambda *a, **kw: (calls.append(1), original(*a, **kw)))
    monkeypatch.setattr(_loss_plan, "FAST_BYTES", 136 * 4 * 30)
    case = Case(101, 19, 131, positive=True)
    case.targets.clamp_(min=0)
    case.weights.fill_(1.0)
    counts = {}
    for cu in ([0, 20, 50, 80, 101], [0, 101]):
        case.cu_seqlens = torch.tensor(cu, dtype=torch.int32)
        for name in ("nll", "dft", "pear_token", "pear_block", "pear_sequence", "iw_sequence"):
            calls.clear()
            ours(case, name)
            counts[name, len(cu)] = len(calls)
    assert counts["nll", 5] == 3 * 4
    assert {counts[key] for key in counts if key[0] in ("nll", "dft", "pear_token", "pear_block")} == {12}
    assert counts["pear_sequence", 5] == counts["iw_sequence", 5] == 12
    assert counts["pear_sequence", 2] == counts["iw_sequence", 2] == 16


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("power", {"alpha": 0}, r"objective_args\['alpha'\]: expected more than 0"),
        ("pear_block", {"block": 2.5}, r"objective_args\['block'\]: expected a whole number"),
        ("pear_block", {"block": 0}, r"objective_args\['block'\]: expected more than 0"),
        ("pear_token", {"delta_min": 1.0}, r"objective_args\['delta_min'\]: expected at most delta_max = 0.3"),
        ("focal", {"gamma": float("nan")}, r"objective_args\['gamma'\]: expected a finite number, got nan"),
        ("focal", {"gamma": "2"}, r"objective_args\['gamma'\]: expected a finite number, got '2'"),
        ("asft", {"direction": "up"}, r"objective_args\['direction'\]: expected one of reverse, forward, got 'up'"),
        ("k3", {"epsilon": 1.0}, r"objective_args: expected for 'k3' only \['beta'\]"),
    ],
)
def test_messages(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours(Case(9, 6, 11), name, args)


def test_plain_is_what_it_says() -> None:
    """The plain formula's own gradient, against torch's cross-entropy."""
    case = Case(31, 24, 257)
    case.weights.fill_(1.0)
    logits = case.hidden.double() @ case.weight.double().T + case.bias.double()
    expected = torch.nn.functional.cross_entropy(logits, case.targets)
    torch.testing.assert_close(plain(case, torch.float64)[0], expected)
