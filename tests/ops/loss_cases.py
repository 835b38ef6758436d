"""Random inputs of the loss, and the same call through the package and through the plain formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import assert_as_good_as_torch

from fastsft import ops
from fastsft.ops import _loss_gradients, _loss_plan, objectives, reference

SHAPES = [(0, 8, 33), (1, 7, 5), (31, 24, 257), (257, 19, 131)]

# Every objective, by name and arguments.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("nll", {}),
    ("dft", {}),
    ("power", {"alpha": 0.5}),
    ("threshold", {"tau": 0.02}),
    ("focal", {"gamma": 2.0}),
    ("entropy_gate", {}),
    ("entropy_gate", {"form": "normalized"}),
    ("ratio_clip", {"epsilon": 0.2}),
    ("hpt", {"epsilon": 0.25}),
    ("k3", {"beta": 0.3}),
    ("pear_token", {}),
    ("pear_token", {"gamma": 0.9, "delta_min": -5.0, "delta_max": 5.0}),
    ("pear_block", {"block": 4}),
    ("pear_block", {"block": 3, "gamma": 0.8, "log_max": 0.3}),
    ("pear_sequence", {"delta_min": -1.0, "delta_max": 1.0}),
    ("iw_sequence", {"low": 0.3, "high": 3.0}),
    ("asft", {"lam": 0.7}),
    ("asft", {"lam": 0.7, "direction": "forward"}),
    *[("f_divergence", {"f": f, "level": v}) for f in ("kl", "pearson", "hellinger") for v in ("token", "sequence")],
]
IDS = [f"{name} {args}" for name, args in CASES]
OF_SEQUENCES = [case for case in CASES if objectives.scope(case[0], objectives.numbers(*case)) != "row"]


def positive(objective: str, args: dict[str, Any]) -> bool:
    """A sequence's summed log-ratio leaves float32 where negative weights make it large."""
    return args.get("level") == "sequence"


class Case:
    """About a third of the targets ignored, some weights zero, some negative unless ``positive``."""

    def __init__(self, tokens: int, width: int, vocab: int, dtype: torch.dtype = torch.float32, seed: int = 0,
                 positive: bool = False) -> None:  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(tokens, width, generator=g).to(dtype)
        self.weight = (torch.randn(vocab, width, generator=g) * 0.5).to(dtype)
        self.bias = torch.randn(vocab, generator=g).to(dtype)
        self.targets = torch.randint(0, vocab, (tokens,), generator=g)
        self.targets[torch.rand(tokens, generator=g) < 0.3] = -100
        self.weights = torch.rand(tokens, generator=g) * 2 - 0.2
        self.weights[torch.rand(tokens, generator=g) < 0.1] = 0
        if positive:
            self.weights = self.weights.abs()
        exact = reference.linear_logprobs(
            self.hidden.double(), self.weight.double(), self.targets, bias=self.bias.double()
        )[0]
        self.ref = (exact + 0.3 * torch.randn(tokens, generator=g)).float()
        cuts = torch.randint(0, tokens + 1, (5,), generator=g).sort().values.tolist()
        self.cu_seqlens = torch.tensor([0, *cuts, cuts[-1], tokens], dtype=torch.int32)
        self.ref_head = (torch.randn(tokens, 5, generator=g).to(dtype), torch.randn(vocab, 5, generator=g).to(dtype))

    def kept(self) -> torch.Tensor:
        return (self.targets != -100) & (self.weights != 0)

    def inputs(self, objective: str, args: dict[str, Any]) -> dict[str, Any]:
        """What this objective needs besides the arguments that all take."""
        needs = objectives.OBJECTIVES[objective].needs
        found: dict[str, Any] = {}
        if needs == "ref_logprobs":
            found["ref_logprobs"] = self.ref
        if needs == "reference":
            found["reference"] = self.ref_head
        if objectives.scope(objective, objectives.numbers(objective, args)) != "row":
            found["cu_seqlens"] = self.cu_seqlens
        return found


def run(case: Case, dtype: torch.dtype, function: Any, upstream: float = 1.0, **kw: Any) -> tuple[torch.Tensor, ...]:
    """Loss and the gradients of hidden, weight and bias, computed in ``dtype``."""
    leaves = [t.to(dtype).detach().requires_grad_() for t in (case.hidden, case.weight, case.bias)]
    loss = function(leaves[0], leaves[1], case.targets, case.weights, bias=leaves[2], **kw)
    (loss.sum() * upstream).backward()
    return (loss.detach(), *[leaf.grad for leaf in leaves])


def ours(case: Case, objective: str = "nll", args: dict[str, Any] | None = None, **kw: Any) -> tuple[torch.Tensor, ...]:
    inputs = case.inputs(objective, args or {})
    return run(case, case.hidden.dtype, ops.linear_cross_entropy, objective=objective, objective_args=args, **inputs,
               **kw)  # fmt: skip


def plain(
    case: Case, dtype: torch.dtype, objective: str = "nll", args: dict[str, Any] | None = None, **kw: Any
) -> tuple[torch.Tensor, ...]:
    inputs = case.inputs(objective, args or {})
    if "ref_logprobs" in inputs:
        inputs["ref_logprobs"] = case.ref.to(dtype)
    if "reference" in inputs:
        inputs["reference"] = tuple(t.to(dtype) for t in case.ref_head)
    complete = objectives.named(objective, objectives.numbers(objective, args or {}))
    return run(case, dtype, reference.linear_cross_entropy, objective=objective, objective_args=complete, **inputs,
               **kw)  # fmt: skip


def check(
    case: Case, objective: str = "nll", args: dict[str, Any] | None = None, lean: bool = False, **kw: Any
) -> None:
    """Ours against autograd on the plain formula in float64."""
    results = [plain(case, dtype, objective, args, **kw) for dtype in (case.hidden.dtype, torch.float64)]
    assert_as_good_as_torch(ours(case, objective, args, lean=lean, **kw), *results)


def small_blocks(monkeypatch: pytest.MonkeyPatch, case: Case, columns: int, tiles: int, heads: int = 1) -> None:
    """In lean mode blocks of that many columns; the rows in that many tiles."""
    rows = -(-int(case.kept().sum()) // tiles)
    monkeypatch.setattr(_loss_plan, "_LEAN_COLUMNS", columns)
    size = _loss_plan.padded(columns) * case.hidden.element_size() * heads
    monkeypatch.setattr(_loss_plan, "LEAN_BYTES", max(1, size * rows))


def record_gradients(monkeypatch: pytest.MonkeyPatch, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64, the sums over the rounded gradients of the logits: for hidden (by rows, not tokens), for weight."""
    hidden, weight = (torch.zeros(t.shape, dtype=torch.float64) for t in (case.hidden, case.weight))
    original = _loss_gradients.Gradients.add

    def add(self: Any, d_logits: torch.Tensor, rows: slice, columns: slice) -> None:
        hidden[rows] += d_logits.double() @ self.rows.weight[columns].double()
        weight[columns] += d_logits.double().T @ self.rows.hidden[rows].double()
        original(self, d_logits, rows, columns)

    monkeypatch.setattr(_loss_gradients.Gradients, "add", add)
    return hidden, weight


def assert_rounded_once(case: Case, got: tuple[torch.Tensor, ...], hidden: torch.Tensor, weight: torch.Tensor) -> None:
    """bfloat16: within half a unit in the last place."""
    kept = case.kept()
    for gradient, exact in ((got[1][kept], hidden[: int(kept.sum())]), (got[2], weight)):
        assert ((gradient.double() - exact).abs() <= 2**-8 * 1.01 * exact.abs() + 1e-7).all()
