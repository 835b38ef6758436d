"""The processes of a run that torchrun started, and what they tell each other.

Every process knows the whole plan of a run, so that micro-batches are shared out without a word. What is exchanged on
the way is small and goes over gloo: losses, verdicts, signals.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
import torch.distributed as dist

T = TypeVar("T")

# The first process may prepare data for hours while the others wait. One that dies is noticed at once: its connections
# close.
_PATIENCE = datetime.timedelta(days=7)
_SMALL = 1 << 16  # elements; below it tensors travel together


class World:
    """Process ``rank`` of ``size``. A single one has no process group, and nothing here costs it anything."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files and talks to the terminal."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return cast("list[T]", values)

    def from_main(self, make: Callable[[], T]) -> T:
        """What ``make`` returns in the first process, in all of them. If it raises there, the others leave."""
        if self.size == 1:
            return make()
        told: list[tuple[bool, T | None]] = [(False, None)]
        try:
            if self.is_main:
                told = [(True, make())]
        finally:
            dist.broadcast_object_list(told, src=0)
        done, value = told[0]
        if not done:
            raise SystemExit(1)  # the first process says why
        return cast(T, value)

    def main_first(self, make: Callable[[], T]) -> T:
        """``make`` in every process, in the others when the first has done with it."""
        kept: list[T] = []
        self.from_main(lambda: kept.append(make()))
        return kept[0] if kept else make()

    def sum_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Sum tensors over the processes, in place and in their own type; the same bits in all of them."""
        if self.size == 1:
            return
        small = [t for t in tensors if t.numel() < _SMALL]
        together = [torch.cat([t.flatten() for t in small])] if small else []
        large = [t for t in tensors if t.numel() >= _SMALL]
        for work in [dist.all_reduce(t, async_op=True) for t in large + together]:
            work.wait()
        for whole in together:
            for tensor, part in zip(small, torch.split(whole, [t.numel() for t in small]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def sum_rows(self, whole: torch.Tensor) -> torch.Tensor:
        """This process's stretch of rows of a sum over the processes, of tensors with a multiple of ``size`` rows."""
        mine = torch.empty_like(whole[: len(whole) // self.size])
        dist.reduce_scatter_tensor(mine, whole)
        return mine


@contextmanager
def joined() -> Iterator[World]:
    """The world of torchrun's environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); one process without it.

    A process group that exists is used, and left as it is.
    """
    if dist.is_available() and dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size())
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
