"""Linear cross-entropy on a GPU, forward and backward, against the three bare products and public kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu_case import Case, Contestant, Entry, Judge, Setting, within_rule
from torch.nn import functional

from fastsft.ops import linear_cross_entropy
from fastsft.ops.objectives import OBJECTIVES
from fastsft.ops.reference import objective_loss

CHUNK = 512  # rows whose logits exist at a time in the exact computation


@dataclass
class Head:
    """The inputs of one case. ``weights``: of the tokens, 0 where masked."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    ref: torch.Tensor
    sequence: int  # tokens of each sequence

    @property
    def cu_seqlens(self) -> torch.Tensor:
        return torch.arange(0, len(self.targets) + 1, self.sequence, dtype=torch.int32, device=self.targets.device)

    @property
    def kept(self) -> int:
        return int((self.targets != -100).sum())


def head(setting: Setting, masked: float = 0.0) -> Head:
    rows, width, vocab, sequence = (48, 32, 400, 16) if setting.small else (4096, 4096, 128_256, 512)
    g, device = setting.generator(), setting.device
    hidden = torch.randn(rows, width, generator=g, device=device).to(torch.bfloat16).requires_grad_()
    weight = (torch.randn(vocab, width, generator=g, device=device) * width**-0.5).to(torch.bfloat16).requires_grad_()
    targets = torch.randint(vocab, (rows,), generator=g, device=device)
    targets[torch.rand(rows, generator=g, device=device) < masked] = -100
    weights = torch.rand(rows, generator=g, device=device) + 0.5
    ref = logprobs(hidden.detach(), weight.detach(), targets.clamp(min=0), torch.float32)
    ref += 0.1 * torch.randn(rows, generator=g, device=device)
    return Head(hidden, weight, targets, weights, ref, sequence)


def logprobs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    weight = weight.to(dtype)
    parts = [
        torch.log_softmax(h.to(dtype) @ weight.T, -1).gather(1, t[:, None])[:, 0]
        for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    return torch.cat(parts)


def by_formula(head: Head, objective: str, weighted: bool, dtype: torch.dtype) -> list[torch.Tensor]:
    """Loss and both gradients; products in ``dtype``, the rows' arithmetic at least in float32."""
    rows_type = torch.promote_types(dtype, torch.float32)
    rows = head.targets != -100
    hidden, targets = head.hidden.detach()[rows].to(dtype), head.targets[rows]
    weight = head.weight.detach().to(dtype)
    weights = head.weights[rows].cpu().double() if weighted else torch.ones(len(targets), dtype=torch.float64)
    position = torch.arange(len(head.targets), device=rows.device)[rows].cpu()
    sequences = [
        torch.nonzero(position // head.sequence == i)[:, 0].tolist() for i in (position // head.sequence).unique()
    ]

    def logits(begin: int) -> torch.Tensor:
        return (hidden[begin : begin + CHUNK] @ weight.T).to(rows_type)

    begins = range(0, len(targets), CHUNK)
    log_p = torch.cat([
        torch.log_softmax(logits(begin), -1).gather(1, targets[begin : begin + CHUNK, None])[:, 0] for begin in begins
    ]).cpu().double().requires_grad_()  # fmt: skip
    arguments = {k: x[0] if isinstance(x, tuple) else x for k, x in OBJECTIVES[objective].arguments.items()}
    ref = head.ref[rows].cpu().double()
    psi = objective_loss(objective, arguments, log_p, torch.zeros_like(log_p), ref, weights, sequences)
    loss = (psi * weights).sum() / weights.sum()
    slope = torch.autograd.grad(loss, log_p)[0].to(targets.device, rows_type)
    d_hidden = torch.zeros_like(head.hidden, dtype=dtype)
    d_kept = torch.empty_like(hidden)
    d_weight = torch.zeros_like(weight, dtype=rows_type)
    for begin in begins:
        part = slice(begin, begin + CHUNK)
        p = torch.softmax(logits(begin), -1)
        p.scatter_add_(1, targets[part, None], torch.full_like(p[:, :1], -1.0))
        gradient = p.mul_(-slope[part, None]).to(dtype)
        d_kept[part] = gradient @ weight
        d_weight += gradient.T @ hidden[part]
    d_hidden[rows] = d_kept
    return [loss.detach().to(targets.device), d_hidden, d_weight.to(dtype)]


def rule(head: Head, objective: str = "nll", weighted: bool = False) -> Judge:
    return within_rule(*(by_formula(head, objective, weighted, dtype) for dtype in (torch.float64, torch.bfloat16)))


def step(head: Head, loss: Callable[[Head], torch.Tensor]) -> Callable[[], Any]:
    """Loss and gradients."""

    def run() -> Any:
        value = loss(head)
        return value.detach(), *torch.autograd.grad(value, (head.hidden, head.weight))

    return run


def ours(**options: Any) -> Callable[[Head], torch.Tensor]:
    return lambda h: linear_cross_entropy(h.hidden, h.weight, h.targets, **options)


def three_products(head: Head) -> Callable[[], Any]:
    """What no exact implementation without tricks on the numbers can do without."""
    x, w = head.hidden.detach(), head.weight.detach()
    logits, dx, dw = x @ w.T, torch.empty_like(x), torch.empty_like(w)

    def run() -> None:
        torch.mm(x, w.T, out=logits)
        torch.mm(logits, w, out=dx)
        torch.mm(logits.T, x, out=dw)

    return run


def eager(head: Head) -> torch.Tensor:
    return functional.cross_entropy(functional.linear(head.hidden, head.weight).float(), head.targets)


def liger(**options: Any) -> Callable[[Head], torch.Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    function = LigerFusedLinearCrossEntropyLoss(**options)
    return lambda h: function(h.weight, h.hidden, h.targets)


def liger_weighted() -> Callable[[Head], torch.Tensor]:
    each = liger(reduction="none")
    return lambda h: (each(h) * h.weights).sum() / h.weights.sum()


def cut_cross_entropy() -> Callable[[Head], torch.Tensor]:
    from cut_cross_entropy import linear_cross_entropy as cce

    return lambda h: cce(h.hidden, h.weight, h.targets)


def torch_fused() -> Callable[[Head], torch.Tensor]:
    try:
        function = functional.linear_cross_entropy  # torch >= 2.13
    except AttributeError as error:
        raise ImportError from error
    return lambda h: function(h.hidden, h.weight, h.targets)


Makers = dict[str, Callable[[], Callable[[Head], torch.Tensor]]]
PUBLIC: Makers = {"liger-kernel": liger, "cut-cross-entropy": cut_cross_entropy, "F.linear_cross_entropy": torch_fused}
# The bar says reduction "none"; some versions of liger have no gradient for it and fail at the first call.
PUBLIC_WEIGHTED: Makers = {"liger-kernel, reduction none": liger_weighted}


def add_rivals(case: Case, setting: Setting, head: Head, makers: Makers, judge: Judge) -> None:
    for name, make in makers.items():
        if not setting.cuda and name != "F.linear_cross_entropy":
            case.absent[name] = "needs CUDA"
            continue
        try:
            case.contestants[name] = Contestant(step(head, make()), judge)
        except ImportError:
            case.absent[name] = "not installed"
        except Exception as error:  # a rival's failure must not end the run
            case.absent[name] = f"failed: {type(error).__name__}: {error}"


def flops(head: Head) -> float:
    return 6.0 * head.kept * head.hidden.shape[1] * head.weight.shape[0]


def unweighted(setting: Setting) -> Case:
    h = head(setting)
    judge = rule(h)
    case = Case(
        {
            "fastsft": Contestant(step(h, ours()), judge),
            "three torch.mm": Contestant(three_products(h)),
            "F.linear + F.cross_entropy": Contestant(step(h, eager), judge),
            "fastsft, lean": Contestant(step(h, ours(lean=True)), judge),
        },
        flops=flops(h),
    )
    add_rivals(case, setting, h, PUBLIC, judge)
    return case


def with_objective(objective: str, weighted: bool) -> Callable[[Setting], Case]:
    def build(setting: Setting) -> Case:
        h = head(setting)
        options: dict[str, Any] = {"objective": objective}
        if weighted:
            options["token_weights"] = h.weights
        if OBJECTIVES[objective].needs:
            options |= {"ref_logprobs": h.ref, "cu_seqlens": h.cu_seqlens}
        judge = rule(h, objective, weighted)
        case = Case(
            {
                "fastsft": Contestant(step(h, ours(**options)), judge),
                "fastsft, unweighted": Contestant(step(h, ours())),
            },
            flops=flops(h),
        )
        if weighted:
            add_rivals(case, setting, h, PUBLIC_WEIGHTED, judge)
        return case

    return build


def masked(setting: Setting) -> Case:
    h, whole = head(setting, 0.6), head(setting)
    judge = rule(h)
    case = Case(
        {
            "fastsft, max_kept": Contestant(step(h, ours(max_kept=h.kept)), judge),
            "fastsft, waits for the count": Contestant(step(h, ours()), judge),
            "fastsft, unmasked": Contestant(step(whole, ours())),
        },
        flops=flops(h),
    )
    add_rivals(case, setting, h, PUBLIC, judge)
    return case


ENTRIES = [
    Entry("loss", "4096 x 4096 x 128256, unweighted", unweighted),
    Entry("loss", "weighted", with_objective("nll", weighted=True)),
    Entry("loss", "dft", with_objective("dft", weighted=False), quick=False),
    Entry("loss", "pear_token", with_objective("pear_token", weighted=False), quick=False),
    Entry("loss", "60 % masked", masked),
]
