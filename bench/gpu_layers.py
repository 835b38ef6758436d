"""Norm, rotary embedding and gate of a decoder layer on a GPU, forward and backward: how near to a copy's rate.

All move memory and compute next to nothing, so that the share of the copy's rate says what is left to gain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu_case import Case, Contestant, Entry, Setting, within_rule
from torch.nn import functional

from fastsft.ops import apply_rope, reference, rms_norm, swiglu

Tensors = Sequence[torch.Tensor]
Layer = Callable[..., Any]  # tensors -> a tensor or several


def step(layer: Layer, inputs: Tensors, upstream: Tensors, constants: int = 0) -> Callable[[], list[torch.Tensor]]:
    """Results and the gradients of all inputs but the last ``constants``."""
    wanted = len(inputs) - constants
    leaves = [x.detach().requires_grad_(i < wanted) for i, x in enumerate(inputs)]

    def run() -> list[torch.Tensor]:
        out = layer(*leaves)
        results = [out] if isinstance(out, torch.Tensor) else list(out)
        return [*(x.detach() for x in results), *torch.autograd.grad(results, leaves[:wanted], upstream)]

    return run


def contest(
    setting: Setting,
    ours: Layer,
    formula: Layer,
    makers: dict[str, Callable[[], Layer]],
    inputs: Tensors,
    moved: float,
    constants: int = 0,
) -> Case:
    """Ours against the formula, eager and compiled, and against public kernels."""
    like = formula(*inputs)
    g = setting.generator(1)
    upstream = [
        torch.randn(x.shape, generator=g, device=x.device).to(x.dtype)
        for x in ([like] if isinstance(like, torch.Tensor) else like)
    ]
    exact = step(formula, [x.double() for x in inputs], [x.double() for x in upstream], constants)()
    judge = within_rule(exact, step(formula, inputs, upstream, constants)())
    case = Case(
        {
            "fastsft": Contestant(step(ours, inputs, upstream, constants), judge),
            "torch, eager": Contestant(step(formula, inputs, upstream, constants), judge),
        },
        moved=moved,
    )
    makers = {"torch.compile": lambda: torch.compile(formula, dynamic=False), **makers}
    for name, make in makers.items():
        if not setting.cuda and not name.startswith("F."):
            case.absent[name] = "needs CUDA"
            continue
        try:
            layer = make()
        except ImportError:
            case.absent[name] = "not installed"
            continue
        # some write into their inputs and the gradients they are given
        own = [x.clone() for x in inputs], [x.clone() for x in upstream]
        case.contestants[name] = Contestant(step(layer, *own, constants), judge)
    return case


def randn(setting: Setting, *shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=setting.generator(seed), device=setting.device).to(torch.bfloat16)


# --- the layers -------------------------------------------------------------------------------------------------------


def liger_norm() -> Layer:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6)


def norm(rows: int, width: int) -> Callable[[Setting], Case]:
    def build(setting: Setting) -> Case:
        n, d = (9, 40) if setting.small else (rows, width)
        inputs = [randn(setting, n, d, seed=2), 1 + randn(setting, d, seed=3) / 2]
        makers: dict[str, Callable[[], Layer]] = {
            "F.rms_norm": lambda: lambda x, w: functional.rms_norm(x, w.shape, w, 1e-6),
            "liger-kernel": liger_norm,
        }
        moved = (2 + 3) * inputs[0].numel() * 2
        return contest(setting, rms_norm, reference.rms_norm, makers, inputs, moved)

    return build


def both(turn: Layer) -> Layer:
    return lambda q, k, cos, sin: (turn(q, cos, sin), turn(k, cos, sin))


def liger_rope(half_tables: Tensors) -> Layer:
    from liger_kernel.ops.rope import LigerRopeFunction

    tables = [torch.cat([x, x], -1)[None] for x in half_tables]

    def turn(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        heads_first = [x.transpose(0, 1)[None] for x in inputs[:2]]
        return tuple(x[0].transpose(0, 1) for x in LigerRopeFunction.apply(*heads_first, *tables))

    return turn


def rope(setting: Setting) -> Case:
    tokens, query, key, size = (9, 3, 1, 10) if setting.small else (16_384, 32, 8, 128)
    angle = torch.rand(tokens, size // 2, generator=setting.generator(), device=setting.device) * 6
    inputs = [
        randn(setting, tokens, query, size, seed=2),
        randn(setting, tokens, key, size, seed=3),
        angle.cos().to(torch.bfloat16),
        angle.sin().to(torch.bfloat16),
    ]
    moved = 2 * 2 * tokens * (2 * (query + key) * size + 2 * size)  # the tables once for q and once for k
    makers = {"liger-kernel": lambda: liger_rope(inputs[2:])}
    return contest(setting, both(apply_rope), both(reference.apply_rope), makers, inputs, moved, constants=2)


def liger_gate() -> Layer:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return lambda gate, up: LigerSiLUMulFunction.apply(gate, up)


def gate(setting: Setting) -> Case:
    shape = (9, 33) if setting.small else (8192, 14_336)
    inputs = [randn(setting, *shape, seed=2) * 2, randn(setting, *shape, seed=3)]
    moved = (3 + 5) * inputs[0].numel() * 2
    return contest(setting, swiglu, reference.swiglu, {"liger-kernel": liger_gate}, inputs, moved)


ENTRIES = [
    Entry("layers", "rms_norm, 16384 x 4096", norm(16_384, 4096)),
    Entry("layers", "rms_norm of heads, 524288 x 128", norm(524_288, 128), quick=False),
    Entry("layers", "rms_norm, 4096 x 16384", norm(4096, 16_384), quick=False),
    Entry("layers", "apply_rope, 16384 tokens, 32 and 8 heads of 128", rope),
    Entry("layers", "swiglu, 8192 x 14336", gate),
]
