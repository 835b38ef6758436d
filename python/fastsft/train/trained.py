"""Trained parameters as an optimizer sees them: a float32 master, a gradient, and pieces that fit a cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn


class Trained:
    """One parameter that is trained.

    A float32 parameter is its own master, and autograd adds up its gradient. Any other gets a float32 copy. The
    gradient of its first micro-batch is kept as it is; with a second one they are added in float32, so that k
    micro-batches accumulate as exactly as one batch.
    """

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.name = name
        self.parameter = parameter
        self.is_own_master = parameter.dtype == torch.float32
        self.master = parameter if self.is_own_master else nn.Parameter(parameter.detach().float().contiguous())
        self._taken: torch.Tensor | None = None
        self._sum: torch.Tensor | None = None  # kept from step to step: fresh pages cost more than the sums

    @property
    def gradient(self) -> torch.Tensor | None:
        """Of all micro-batches since the last step."""
        return self.parameter.grad if self.is_own_master else self._taken

    def collect(self) -> None:
        """Take the gradient of a micro-batch."""
        gradient = self.parameter.grad
        if self.is_own_master or gradient is None:
            return
        if self._taken is None:
            self._taken = gradient
        else:
            self.float_gradient().add_(gradient)
        self.parameter.grad = None

    def float_gradient(self) -> torch.Tensor:
        """The gradient itself in float32, to be added to; zeros before the first micro-batch."""
        if self.is_own_master:
            if self.parameter.grad is None:
                self.parameter.grad = self._buffer().zero_()
            return self.parameter.grad
        buffer = self._buffer()
        if self._taken is None:
            buffer.zero_()
        elif self._taken is not buffer:
            buffer.copy_(self._taken)
        self._taken = buffer
        return buffer

    def _buffer(self) -> torch.Tensor:
        if self._sum is None:
            self._sum = torch.empty_like(self.master, requires_grad=False)
        return self._sum

    def drop_gradient(self) -> None:
        self.parameter.grad = self._taken = None

    def publish(self) -> None:
        """Round the master into the parameter."""
        if not self.is_own_master:
            self.parameter.copy_(self.master)

    def restore_master(self, tensors: Mapping[str, torch.Tensor]) -> None:
        if not self.is_own_master:
            restore(self.master, f"master/{self.name}", tensors)
            self.publish()


@dataclass(frozen=True)
class Piece:
    """A stretch of a flattened parameter."""

    of: Trained
    begin: int
    end: int

    def __len__(self) -> int:
        return self.end - self.begin

    def within(self, tensor: torch.Tensor) -> torch.Tensor:
        """The stretch of a contiguous tensor of the parameter's size."""
        return tensor.detach().view(-1)[self.begin : self.end]


class Batches:
    """Pieces in batches of a bounded number of elements.

    One pass over memory for what takes several operations: those after the first find a batch in the cache. Small
    parameters share a batch, and so a call.
    """

    def __init__(self, parameters: Iterable[Trained]) -> None:
        parameters = list(parameters)
        on_cpu = not parameters or parameters[0].master.is_cpu
        limit = 1 << 19 if on_cpu else 1 << 24  # on a GPU the launches count, not its cache
        self._batches: list[list[Piece]] = []
        room = 0
        for one in parameters:
            done, size = 0, one.master.numel()
            while done < size:
                if room == 0:
                    self._batches.append([])
                    room = limit
                piece = Piece(one, done, min(size, done + room))
                self._batches[-1].append(piece)
                done += len(piece)
                room -= len(piece)
        longest = max((sum(map(len, batch)) for batch in self._batches), default=0)
        self._scratch = torch.empty(longest, device=parameters[0].master.device if parameters else None)

    def gradients(self) -> Iterator[tuple[list[Piece], list[torch.Tensor]]]:
        """Each batch's pieces that have a gradient, and these gradients in float32, valid until the next batch."""
        for batch in self._batches:
            pieces, found, used = [], [], 0
            for piece in batch:
                whole = piece.of.gradient
                if whole is None:
                    continue
                gradient = piece.within(whole.contiguous())
                if gradient.dtype != torch.float32:
                    gradient = self._scratch[used : used + len(piece)].copy_(gradient)
                    used += len(piece)
                pieces.append(piece)
                found.append(gradient)
            if pieces:
                yield pieces, found


@dataclass(frozen=True)
class WideGradients:
    """float32 [V, D] to which the gradients of embedding and head are added, the same tensor where the two are tied.
    None: autograd keeps that gradient, or there is none."""

    embedding: torch.Tensor | None = None
    head: torch.Tensor | None = None


class WholeGradients:
    """Gradients for the ``torch.optim`` classes, which want those of all parameters, in float32, at once."""

    def __init__(self, parameters: Sequence[Trained]) -> None:
        self._parameters = parameters
        largest = max(parameters, key=lambda one: one.master.numel())
        self._scratch = torch.empty_like(largest.master, requires_grad=False).view(-1)

    def each(self, divisor: float) -> Iterator[Trained]:
        """Every parameter with a gradient, in turn: its master's ``grad`` alone is set, to the gradient / divisor."""
        given = [(one, one.gradient) for one in self._parameters]
        for one, _ in given:
            one.master.grad = None
        for one, gradient in given:
            if gradient is not None:
                one.master.grad = self._scratch[: gradient.numel()].view_as(gradient).copy_(gradient).div_(divisor)
                yield one
                one.master.grad = None


def restore(tensor: torch.Tensor, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy a tensor of a saved state, bit for bit.

    Raises:
        ValueError: it is not there, or not alike: the state is of another model or optimizer.
    """
    found = tensors.get(key)
    expected = f"{tensor.dtype} {list(tensor.shape)}"
    if found is None:
        raise ValueError(f"optimizer state: {key}: expected {expected}, found none")
    if found.shape != tensor.shape or found.dtype != tensor.dtype:
        raise ValueError(f"optimizer state: {key}: expected {expected}, got {found.dtype} {list(found.shape)}")
    tensor.detach().copy_(found)
