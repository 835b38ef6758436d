"""Which sequences run in the next step. Continuous batching: sequences join and leave between steps.

Prefill goes first (it is what a new request waits for), in chunks under a token budget. A sequence is admitted when
the cache has room for all tokens it has so far, so admitted prompts never wait for each other's blocks. When a decoding
sequence needs a block and none is free, the newest admitted one gives up its blocks and later recomputes. The oldest
can always go on, because no sequence is accepted that would not fit alone: nothing starves.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from fastsft.engine.blocks import BlockAllocator
from fastsft.engine.sequence import Sequence


@dataclass(frozen=True)
class Step:
    """Sequences to run, each with the number of its tokens to compute: prompt chunks (``prefill``) or one each."""

    prefill: bool
    work: list[tuple[Sequence, int]]


class Scheduler:
    def __init__(
        self, allocator: BlockAllocator, *, block_size: int, max_num_seqs: int, max_batched_tokens: int
    ) -> None:
        self.allocator = allocator
        self.block_size, self.max_num_seqs, self.max_batched_tokens = block_size, max_num_seqs, max_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def schedule(self) -> Step:
        """The next step; call only while :attr:`busy`."""
        while self.waiting and len(self.running) < self.max_num_seqs:
            needed = self._blocks_for(len(self.waiting[0].tokens))
            if needed > self.allocator.num_free:
                break
            sequence = self.waiting.popleft()
            sequence.blocks = self.allocator.allocate(needed)
            self.running.append(sequence)
        budget = self.max_batched_tokens
        work: list[tuple[Sequence, int]] = []
        for sequence in self.running:
            left = len(sequence.tokens) - sequence.computed
            if left > 1 or sequence.computed < sequence.prompt_len:  # a prompt's last token is still prefill
                chunk = min(left, budget)
                if chunk == 0:
                    break
                work.append((sequence, chunk))
                budget -= chunk
        if work:
            return Step(True, work)
        return Step(False, [(s, 1) for s in self._decodable()])

    def _decodable(self) -> list[Sequence]:
        """Give every running sequence the block for its next token, preempting from the newest where none is left."""
        for sequence in list(self.running):
            while sequence in self.running and len(sequence.blocks) < self._blocks_for(len(sequence.tokens)):
                if self.allocator.num_free:
                    sequence.blocks += self.allocator.allocate(1)
                else:
                    self._preempt(self.running[-1])
        return list(self.running)

    def _preempt(self, sequence: Sequence) -> None:
        self.finish(sequence)
        sequence.computed = 0
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def preempt_all(self) -> None:
        while self.running:
            self._preempt(self.running[-1])

    def finish(self, sequence: Sequence) -> None:
        """Take a running sequence out and free its blocks."""
        self.running.remove(sequence)
        self.allocator.release(sequence.blocks)
        sequence.blocks = []

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is."""
        if sequence in self.running:
            self.finish(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def fork(self, parent: Sequence, child: Sequence) -> tuple[int, int] | None:
        """Start ``child`` on the computed prompt of ``parent``: full blocks are shared, a partly filled one is new.

        Returns:
            (source, target) of the block to copy, or None where the prompt fills its blocks. A child for which there is
            no room joins the waiting ones and computes its prompt itself.
        """
        full, rest = divmod(parent.computed, self.block_size)
        if len(self.running) >= self.max_num_seqs or (rest and not self.allocator.num_free):
            self.add(child)
            return None
        child.blocks = parent.blocks[:full]
        self.allocator.share(child.blocks)
        child.computed = parent.computed
        self.running.append(child)
        if not rest:
            return None
        child.blocks = child.blocks + self.allocator.allocate(1)
        return parent.blocks[full], child.blocks[full]

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)
