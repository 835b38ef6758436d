"""Which tokens of a batch become rows of the loss's matrix products: those with weight, moved together."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Kept:
    """The tokens whose weight is not 0, in order.

    Without a bound their number is read back, for which the host waits once. With one, nothing is read back: there are
    as many rows as the bound says, the last of them empty (zeros, which add nothing), and if there are more tokens than
    that, all that is not computed reads NaN.
    """

    def __init__(self, token_weights: Tensor, bound: int | None) -> None:
        self.total = token_weights.numel()
        self.empty: Tensor | None = None  # bool [count], with a bound
        if bound is None:
            self.tokens = token_weights.nonzero()[:, 0]  # int64 [count]: each row's token
        else:
            rank = (token_weights != 0).cumsum(0)  # of a token among those kept, from 1
            bound = min(bound, self.total)
            wanted = torch.arange(1, bound + 1, device=rank.device)
            self.tokens = torch.searchsorted(rank, wanted)  # `total` for an empty row
            self.empty = self.tokens == self.total
            self.rest = torch.where(rank[-1:] > bound, math.nan, 0.0)  # [1]: what tokens without a row read
        self.count = self.tokens.numel()

    def take(self, tensor: Tensor) -> Tensor:
        """The rows, [count, ...], of a tensor [total, ...]."""
        if self.empty is None:
            return tensor if self.count == self.total else tensor.index_select(0, self.tokens)
        rows = tensor.index_select(0, self.tokens.clamp(max=self.total - 1))
        return rows.masked_fill_(self.empty.view(-1, *[1] * (rows.dim() - 1)), 0)

    def put(self, rows: Tensor) -> Tensor:
        """The inverse: a tensor [total, ...], 0 for tokens that are not kept."""
        if self.empty is None:
            if self.count == self.total:
                return rows
            return rows.new_zeros(self.total, *rows.shape[1:]).index_copy_(0, self.tokens, rows)
        if self.total == 0:
            return rows
        rest = self.rest.to(rows.dtype).view(1, *[1] * (rows.dim() - 1))
        every = rest.repeat(self.total + 1, *rows.shape[1:])  # the last one takes what the empty rows hold
        return every.index_copy_(0, self.tokens, rows)[: self.total]
