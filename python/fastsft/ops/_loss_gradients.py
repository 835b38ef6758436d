"""The gradients of the loss, summed over tiles of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsft.ops import _loss_products
from fastsft.ops._loss_inputs import BIAS, HIDDEN, WEIGHT, Inputs, gradient_dtype
from fastsft.ops._loss_plan import Plan
from fastsft.ops._memory import large_empty


class Gradients:
    """Sums over tiles. The weight's is float32 until all rows have been through a block of it, then rounded once."""

    def __init__(self, rows: Inputs, grads: int, plan: Plan) -> None:
        self.rows, self.grads = rows, grads
        self.scale = tamed(rows)[2]
        self.dtype = gradient_dtype(rows.hidden.dtype)
        hidden, weight, into = rows.hidden, rows.weight, rows.accumulate_into
        once = len(plan.columns) == 1
        self.d_hidden = large_empty(
            hidden.shape if grads & HIDDEN else (0,), hidden, self.dtype if once else torch.float32
        )
        self.d_bias = hidden.new_zeros(weight.shape[0] if grads & BIAS else 0, dtype=torch.float32)
        wanted = bool(grads & WEIGHT)
        self.d_weight = large_empty(weight.shape if wanted and into is None else (0,), weight, self.dtype)
        self.block: Tensor | None = None  # of the weight's gradient, where it is summed up elsewhere
        self.in_place = into is not None and self.scale is None
        rounds = len(plan.rows) > 1 and self.dtype != torch.float32
        if wanted and (rounds if into is None else not self.in_place):
            columns = max(end - begin for begin, end in plan.columns)
            self.block = large_empty((columns, weight.shape[1]), weight, torch.float32)
        self.started = False  # on this block

    def _target(self, columns: slice) -> Tensor:
        """Where the gradient of this block of the weight is summed up."""
        if self.block is not None:
            return self.block[: columns.stop - columns.start]
        into = self.rows.accumulate_into
        return (self.d_weight if into is None else into)[columns]

    def add(self, d_logits: Tensor, rows: slice, columns: slice) -> None:
        if self.grads & HIDDEN:
            _loss_products.multiply(
                d_logits, self.rows.weight[columns], self.d_hidden[rows], accumulate=columns.start > 0
            )
        if self.grads & WEIGHT:
            so_far = self.started or self.in_place
            _loss_products.multiply(d_logits.t(), self.rows.hidden[rows], self._target(columns), accumulate=so_far)
            self.started = True
        if self.grads & BIAS:
            self.d_bias[columns] += d_logits.sum(0, dtype=torch.float32)

    def finish(self, columns: slice) -> None:
        """All rows have been through this block."""
        if self.grads & WEIGHT:
            target, into = self._target(columns), self.rows.accumulate_into
            if not self.started and not self.in_place:
                target.zero_()
            if into is not None and self.scale is not None:
                into[columns].addcmul_(target, self.scale)
            elif self.block is not None:
                self.d_weight[columns] = target
        self.started = False

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.scale is not None:
            for gradient in (self.d_hidden, self.d_weight, self.d_bias):
                gradient.mul_(self.scale)
        return self.d_hidden.to(self.dtype), self.d_weight, self.d_bias


def tamed(rows: Inputs) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradient's factors per token, divided by the largest in float16, where they would underflow; and that."""
    if rows.hidden.dtype != torch.float16 or rows.grad_weights.numel() == 0:
        return rows.grad_weights, rows.entropy_grads, None
    peak = rows.grad_weights.abs().max()
    if rows.entropy_grads is not None:
        peak = torch.maximum(peak, rows.entropy_grads.abs().max())
    peak = torch.where(peak > 0, peak, 1.0)
    return rows.grad_weights / peak, None if rows.entropy_grads is None else rows.entropy_grads / peak, peak
