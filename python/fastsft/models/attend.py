"""How a decoder layer attends: a callable, so that a model also runs on what packed documents are compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastsft import ops
from fastsft.ops.attention import AttentionPlan

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, "tuple[int, int] | None"], torch.Tensor]
"""``attend(layer, q [T, Hq, K], k [T, Hkv, K], v [T, Hkv, K], window) -> [T, Hq, K]``, causal, scaled by K**-0.5.

``q`` and ``k`` are rotated. ``window = (left, 0)`` limits a query to itself and ``left`` keys before; None: any.
"""


class VarlenAttend:
    """Causal attention within each packed document, for training and for scoring.

    Args:
        cu_seqlens: int32 [B + 1], where the documents begin, and the number of tokens.
    """

    def __init__(self, cu_seqlens: torch.Tensor) -> None:
        self.cu_seqlens = cu_seqlens
        self._plans: dict[tuple[int, int] | None, AttentionPlan] = {}  # by window

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: tuple[int, int] | None
    ) -> torch.Tensor:
        del layer  # nothing is kept between layers
        plan = self._plans.get(window)
        if plan is None:  # made at the first layer with this window, for all of them
            plan = ops.attention_plan(self.cu_seqlens, total_q=q.shape[0], window=window)
            self._plans[window] = plan
        out: torch.Tensor = ops.varlen_attention(q, k, v, self.cu_seqlens, causal=True, window=window, plan=plan)
        return out
