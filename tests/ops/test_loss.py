"""linear_cross_entropy and linear_logprobs against the plain formulas of ops/reference.py in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastsft import _C, ops
from fastsft.ops import loss as loss_module
from fastsft.ops import reference

SHAPES = [(0, 8, 33), (1, 7, 5), (31, 24, 257), (257, 19, 131)]
OBJECTIVE_CASES: list[tuple[str, dict[str, float]]] = [
    ("nll", {}),
    ("dft", {}),
    ("power", {"alpha": 0.5}),
    ("threshold", {"tau": 0.02}),
    ("focal", {"gamma": 2.0}),
    ("entropy_gate", {}),
    ("ratio_clip", {"epsilon": 0.2}),
    ("k3", {"beta": 0.3}),
]
OPTIONS: list[dict[str, Any]] = [
    {"softcap": 4.0},
    {"temperature": 0.7},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01},
    {"softcap": 3.0, "temperature": 1.4, "label_smoothing": 0.2, "z_loss": 0.02},
]


class Case:
    """Random inputs: about a third of the targets ignored, some weights zero, some negative."""

    def __init__(self, tokens: int, width: int, vocab: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(tokens, width, generator=g).to(dtype)
        self.weight = (torch.randn(vocab, width, generator=g) * 0.5).to(dtype)
        self.bias = torch.randn(vocab, generator=g).to(dtype)
        self.targets = torch.randint(0, vocab, (tokens,), generator=g)
        self.targets[torch.rand(tokens, generator=g) < 0.3] = -100
        self.weights = torch.rand(tokens, generator=g) * 2 - 0.2
        self.weights[torch.rand(tokens, generator=g) < 0.1] = 0
        exact = reference.linear_logprobs(self.hidden.double(), self.weight.double(), self.targets)[0]
        self.ref = (exact + 0.3 * torch.randn(tokens, generator=g)).float()


def run(case: Case, dtype: torch.dtype, function: Any, upstream: float = 1.0, **kw: Any) -> tuple[torch.Tensor, ...]:
    """Loss and the gradients of hidden, weight and bias, computed in ``dtype``."""
    leaves = [t.to(dtype).detach().requires_grad_() for t in (case.hidden, case.weight, case.bias)]
    loss = function(leaves[0], leaves[1], case.targets, case.weights, bias=leaves[2], **kw)
    (loss.sum() * upstream).backward()
    return (loss.detach(), *[leaf.grad for leaf in leaves])


def ours(case: Case, objective: str, args: dict[str, float], **kw: Any) -> tuple[torch.Tensor, ...]:
    ref = case.ref if objective in ("ratio_clip", "k3") else None
    return run(case, case.hidden.dtype, ops.linear_cross_entropy, objective=objective, objective_args=args,
               ref_logprobs=ref, **kw)  # fmt: skip


def plain(
    case: Case, dtype: torch.dtype, objective: str, args: dict[str, float], **kw: Any
) -> tuple[torch.Tensor, ...]:
    ref = case.ref.to(dtype) if objective in ("ratio_clip", "k3") else None
    argument = next(iter(args.values()), 0.0)
    return run(case, dtype, reference.linear_cross_entropy, objective=objective, argument=argument,
               ref_logprobs=ref, **kw)  # fmt: skip


def assert_as_good_as_torch(got: Any, torch_same: Any, exact: Any) -> None:
    """The rule of docs/numerics.md: at most twice torch's own error, in norm and elementwise."""
    for ours_, theirs, ref in zip(got, torch_same, exact, strict=True):
        if ref.numel() == 0:
            assert ours_.shape == ref.shape
            continue
        unit = torch.finfo(ours_.dtype).eps * (1 + ref.abs().max())
        error, allowed = (ours_.double() - ref).abs(), (theirs.double() - ref).abs()
        assert error.max() <= 2 * allowed.max() + 4 * unit
        assert error.norm() <= 2 * allowed.norm() + 4 * unit * ref.numel() ** 0.5


@pytest.mark.parametrize(("objective", "args"), OBJECTIVE_CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_objectives(shape: tuple[int, int, int], objective: str, args: dict[str, float]) -> None:
    case = Case(*shape)
    results = [ours(case, objective, args), plain(case, torch.float32, objective, args),
               plain(case, torch.float64, objective, args)]  # fmt: skip
    assert_as_good_as_torch(*results)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_options(shape: tuple[int, int, int], options: dict[str, Any]) -> None:
    case = Case(*shape)
    assert_as_good_as_torch(*[ours(case, "nll", {}, **options), plain(case, torch.float32, "nll", {}, **options),
                              plain(case, torch.float64, "nll", {}, **options)])  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    case = Case(257, 64, 1031, dtype)
    assert_as_good_as_torch(ours(case, "nll", {}), plain(case, dtype, "nll", {}), plain(case, torch.float64, "nll", {}))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("upstream", [1.0, -2.5])
@pytest.mark.parametrize("objective", ["nll", "power"])
def test_reductions_and_upstream_gradient(reduction: str, upstream: float, objective: str) -> None:
    case, args = Case(31, 24, 257), {"alpha": 0.5} if objective == "power" else {}
    kw = {"reduction": reduction, "upstream": upstream}
    assert_as_good_as_torch(ours(case, objective, args, **kw), plain(case, torch.float32, objective, args, **kw),
                            plain(case, torch.float64, objective, args, **kw))  # fmt: skip


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


@pytest.mark.parametrize("objective", ["power", "ratio_clip", "k3"])
def test_live_weights_against_finite_differences(objective: str) -> None:
    """The gradient of what the loss reports, where the weight is not detached."""
    case = Case(5, 6, 9, seed=3)
    case.weights.fill_(1.0)
    ref = case.ref if objective != "power" else None
    weight = case.weight.double()

    def value(hidden: torch.Tensor) -> float:
        args = {"objective": objective, "argument": {"power": 1.0, "ratio_clip": 0.2, "k3": 0.1}[objective]}
        return float(reference.linear_cross_entropy(hidden, weight, case.targets, ref_logprobs=ref, **args))  # type: ignore[arg-type]

    hidden = case.hidden.requires_grad_()
    loss = ops.linear_cross_entropy(hidden, case.weight, case.targets, objective=objective, ref_logprobs=ref)
    loss.backward()
    for i in range(case.hidden.numel()):
        step = torch.zeros(case.hidden.numel(), dtype=torch.float64)
        step[i] = 1e-6
        step = step.view_as(case.hidden)
        slope = (value(hidden.detach().double() + step) - value(hidden.detach().double() - step)) / 2e-6
        assert abs(slope - float(hidden.grad.view(-1)[i])) < 1e-5  # type: ignore[union-attr]


def test_all_weights_zero() -> None:
    case = Case(9, 6, 11)
    case.weights.zero_()
    for result in ours(case, "nll", {}):
        assert torch.equal(result, torch.zeros_like(result))


def test_frozen_head_and_frozen_hidden() -> None:
    case = Case(31, 24, 257)
    full = ours(case, "nll", {})
    for frozen in (0, 1):
        leaves = [case.hidden.clone(), case.weight.clone()]
        leaves[1 - frozen].requires_grad_()
        ops.linear_cross_entropy(*leaves, case.targets, case.weights, bias=case.bias).backward()
        assert leaves[frozen].grad is None
        assert torch.equal(leaves[1 - frozen].grad, full[2 - frozen])


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


def test_tiles_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(257, 19, 131)
    whole = ours(case, "nll", {})
    monkeypatch.setattr(loss_module, "_TILE_BYTES", 131 * 4 * 10)
    for a, b in zip(ours(case, "nll", {}), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_logits_never_exist_beyond_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.profiler import ProfilerActivity, profile

    tile = 1 << 16
    monkeypatch.setattr(loss_module, "_TILE_BYTES", tile)
    hidden, weight = torch.randn(2048, 8, requires_grad=True), torch.randn(1024, 8, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        ops.linear_cross_entropy(hidden, weight, torch.zeros(2048, dtype=torch.int64)).backward()
    largest = max(e.cpu_memory_usage for e in record.events())
    assert largest <= 2048 * 1024 * 4 / 8, "an allocation near the size of all logits"


def test_bits_do_not_depend_on_our_threads() -> None:
    case, threads = Case(257, 19, 131), _C.num_threads()
    try:
        results = []
        for n in (1, 3):
            _C.set_num_threads(n)
            results.append(ours(case, "nll", {}))
    finally:
        _C.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", _C.available_isas())
def test_instruction_sets_agree(name: str) -> None:
    case, active = Case(31, 24, 257), _C.active_isa()
    exact = plain(case, torch.float64, "focal", {"gamma": 2.0})
    try:
        _C.set_isa(name)
        got = ours(case, "focal", {"gamma": 2.0})
    finally:
        _C.set_isa(active)
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
    case = Case(31, 24, 257)
    logits = case.hidden @ case.weight.T
    targets = case.targets.clamp(min=0)
    ref = reference.linear_logprobs(case.hidden, case.weight, targets)[0] + 0.1
    per_token = [targets, case.weights, case.weights, case.weights * 0.1, ref]
    for number in range(8):
        options = (number, 0.3, 4.0, 0.8, 0.1 if number == 0 else 0.0, 0.01)
        results = []
        for rows in (loss_module._rows_native, loss_module._rows_torch):
            tile, outputs = logits.clone(), [torch.empty(31) for _ in range(4)]
            rows(tile, case.bias, per_token, options, True, outputs)
            results.append([*outputs, tile])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_opcheck() -> None:
    case = Case(17, 6, 37)
    w = torch.where(case.targets == -100, 0.0, case.weights)
    args = (case.hidden, case.weight, case.bias, case.targets, w, w, None, None, 0, 0.0, 0.0, 1.0, 0.0, 0.0, 7)
    torch.library.opcheck(torch.ops.fastsft.linear_cross_entropy.default, args)


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
    ({"objective": "k3"}, "ref_logprobs: expected a tensor for 'k3', got None"),
    ({"ref_logprobs": torch.zeros(4)}, "ref_logprobs: expected None for 'nll'"),
    ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens: expected None"),
    ({"objective": "dft", "label_smoothing": 0.1}, "label_smoothing: expected 0 for 'dft'"),
    ({"reduction": "avg"}, "reduction: expected 'mean', 'sum' or 'none', got 'avg'"),
    ({"reduction": "sum", "normalizer": 3.0}, "normalizer: expected reduction='mean'"),
    ({"temperature": 0.0}, "temperature: expected more than 0"),
    ({"softcap": -1.0}, "softcap: expected at least 0"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=lambda x: str(x)[:40] if isinstance(x, str) else "")
def test_messages(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.linear_cross_entropy(**{"hidden": H, "weight": W, "targets": T, **change})
