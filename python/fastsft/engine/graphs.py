"""Steps of few tokens in buffers that stay where they are, so that CUDA graphs can replay them.

A layer of such a step is a dozen kernels of a few microseconds each, which the host takes longer to launch than the
device to run. A graph is one launch for all of them. It repeats what it saw: the same kernels on the same addresses.
So each token is a sequence of its own, which ends with it: a token and its drafts share the blocks of their context.
A step is padded to 1, 2, 4, 8, ... of them and a block table of so many columns, and has one buffer for each pair of
these; rows that pad write to a block that nobody reads. All are captured before the first request: a capture waits for
the device and takes as long as many steps.

Shape suffixes: T tokens of a step, N of its bucket, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Protocol

import torch

from fastsft.engine.runner import Inputs, places_of
from fastsft.models.device import DeviceDecoder, Rows

_SEGMENT = 256  # keys that paged attention takes at a time: tables of fewer make the same kernels


class Graph(Protocol):
    def replay(self) -> None:
        """Run again what was captured, on what the same addresses hold now."""


Capture = Callable[[Callable[[], None]], Graph]
"""Records what a function launches, without running it. The function has run before: nothing is compiled now."""


class CudaCapture:
    """:data:`Capture` on one device. All graphs share one memory for what is between their kernels: they are
    replayed one after the other, and their results are in buffers of their own.

    Their stream is one of the device: torch's own for captures is on the device that made one first. Other threads,
    such as one that pins memory for a loader, may call CUDA meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: Any = None

    def __call__(self, run: Callable[[], None]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        options: dict[str, Any] = {"stream": self._stream, "capture_error_mode": "thread_local"}
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool, **options):
            run()
        self._pool = graph.pool()
        return graph


@dataclass
class _Step:
    """The step of one size. ``buffer`` holds all that changes from step to step, so that one copy brings it."""

    buffer: torch.Tensor
    rows: Rows
    graph: Graph | None = None


class DecodeSteps:
    """Runs steps of few tokens, by graphs where they can be captured, with the same results without.

    Args:
        cache: of ``model``; its last block is nobody's.
        max_rows: tokens of a step.
        capture: None runs every step kernel by kernel.

    Attributes:
        max_rows: that many, rounded up to a power of two.
        replayed: steps that were one launch.
    """

    def __init__(
        self, model: DeviceDecoder, cache: torch.Tensor, *, block_size: int, max_rows: int, capture: Capture | None
    ) -> None:
        self._model, self._cache, self._block_size, self._capture = model, cache, block_size, capture
        self._spare = cache.shape[2] - 1
        self._narrowest = bucket_of(-(-_SEGMENT // block_size))
        longest = -(-model.config.max_position_embeddings // block_size)
        self._widest = self._width_of(min(self._spare, longest))
        self.max_rows, self.replayed = bucket_of(max_rows), 0
        shape_ND, shape_NV = (self.max_rows, model.config.hidden_size), (self.max_rows, model.config.vocab_size)
        self._hidden_ND = torch.zeros(shape_ND, dtype=model.dtype, device=model.device)
        self._logits_NV = torch.zeros(shape_NV, dtype=torch.float32, device=model.device)
        self._steps: dict[tuple[int, int], _Step] = {}

    def __call__(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [T, D] and logits [T, V] of the step's tokens, in memory that the next call overwrites."""
        count = len(inputs.ids_T)
        size, width = bucket_of(count), self._width_of(inputs.block_table.shape[1])
        step = self._step(size, width)
        step.buffer.copy_(self._filled(inputs, size, width))
        if step.graph is None:
            self._run(step.rows, size)
        else:
            step.graph.replay()
            self.replayed += 1
        return self._hidden_ND[:count], self._logits_NV[:count]

    @property
    def captured(self) -> int:
        """Graphs that there are."""
        return sum(step.graph is not None for step in self._steps.values())

    def capture_all(self, tell: Callable[[int, int], None]) -> None:
        """Capture the steps of all sizes that can come, if graphs are wanted; ``tell`` of (done, all).

        The largest goes first: the memory between its kernels serves the others too.
        """
        if self._capture is None:
            return
        halves = [
            [greatest >> i for i in range((greatest // least).bit_length())]
            for greatest, least in ((self.max_rows, 1), (self._widest, self._narrowest))
        ]
        sizes = list(product(*halves))
        for done, (size, width) in enumerate(sizes):
            tell(done, len(sizes))
            self.capture(size, width)
        tell(len(sizes), len(sizes))

    def capture(self, count: int, columns: int) -> None:
        """Capture the step that serves so many tokens and columns of the block table, if graphs are wanted."""
        size, width = bucket_of(count), self._width_of(columns)
        step = self._step(size, width)
        if self._capture and step.graph is None:
            step.buffer.copy_(self._padding(size, width))
            run = partial(self._run, step.rows, size)
            run()  # compiles and loads what it launches: a capture cannot
            step.graph = self._capture(run)

    def _width_of(self, columns: int) -> int:
        return max(bucket_of(columns), self._narrowest)

    def _step(self, size: int, width: int) -> _Step:
        if (size, width) not in self._steps:
            self._steps[size, width] = self._new_step(size, width)
        return self._steps[size, width]

    def _new_step(self, size: int, width: int) -> _Step:
        buffer = torch.zeros(size * (4 + width), dtype=torch.int32, device=self._model.device)
        ids, positions, slots, contexts = buffer[: 4 * size].view(4, size)
        rows = Rows(
            ids_T=ids,
            positions_T=positions,
            slots_T=slots,
            block_table=buffer[4 * size :].view(size, width),
            cu_seqlens=torch.arange(size + 1, dtype=torch.int32, device=self._model.device),
            context_lens_B=contexts,
        )
        return _Step(buffer, rows)

    def _filled(self, inputs: Inputs, size: int, width: int) -> torch.Tensor:
        """What the buffer is to hold, on the host."""
        count, columns = len(inputs.ids_T), inputs.block_table.shape[1]
        owner_T, positions_T, slots_T = places_of(inputs, self._block_size)
        filled = self._padding(size, width)
        filled[: 4 * size].view(4, size)[:, :count] = torch.stack([inputs.ids_T, positions_T, slots_T, positions_T + 1])
        filled[4 * size :].view(size, width)[:count, :columns] = inputs.block_table[owner_T]
        return filled

    def _padding(self, size: int, width: int) -> torch.Tensor:
        """Rows that pad, on the host: each is a context of one token in the spare block."""
        heads = torch.tensor([0, 0, self._spare * self._block_size, 1], dtype=torch.int32)
        table = torch.full((size * width,), self._spare, dtype=torch.int32)
        return torch.cat([heads.repeat_interleave(size), table])

    def _run(self, rows: Rows, size: int) -> None:
        hidden_ND = self._model.hidden(rows, self._cache)
        self._hidden_ND[:size].copy_(hidden_ND)
        self._model.logits(hidden_ND, out=self._logits_NV[:size])


def bucket_of(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()
