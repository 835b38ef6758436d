"""Which sequences compute how many tokens in the next step. Continuous batching: they join and leave between steps.

A step first takes one token of every sequence that generates, then chunks of prompts under a token budget, and drafts
where blocks are left. Lower priorities go first and, among equal ones, who came first; nobody overtakes the first that
waits. A sequence is admitted when the cache has room for all tokens it has so far, so that admitted prompts never wait
for each other's blocks, and when the budget has some left for it: until then its prefix may still come to be computed
by another. When a generating sequence needs a block and none is free, the last in order gives up its blocks and later
computes again what can no longer be found. The first in order can always go on, because no sequence is accepted that
would not fit alone: nothing starves.

Where another process computes prompts, all but their last tokens go there, one job at a time, while steps go on; the
last token, after which logits are wanted, is computed here as a generated one is. Until the job is over nobody is
admitted, what it computes cannot be found, and blocks of those that are given up meanwhile are not let go.
"""

from __future__ import annotations

import bisect
from array import array
from collections import deque
from collections.abc import Iterable, Iterator

from fastsft.engine.blocks import BlockAllocator, chain_key
from fastsft.engine.sequence import Sequence
from fastsft.engine.step import Drafter, Step, Work
from fastsft.engine.tree import Fork, rows_of

_SCORED_TOKENS = 256  # in one step: each has logits over the whole vocabulary


class Scheduler:
    """``splits``: prompts are computed apart."""

    def __init__(
        self,
        allocator: BlockAllocator,
        *,
        block_size: int,
        max_num_seqs: int,
        max_batched_tokens: int,
        splits: bool = False,
    ) -> None:
        self.allocator, self.splits = allocator, splits
        self.apart: list[Work] | None = None
        """What another process is at; None: nothing."""
        self._left_behind: list[int] = []  # blocks of those that left while it is
        self.block_size, self.max_num_seqs, self.max_batched_tokens = block_size, max_num_seqs, max_batched_tokens
        self.waiting: list[Sequence] = []  # both in order
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.found_tokens = 0
        """Tokens that were not computed because their blocks were found."""
        self._root = b"weights 0"  # what the keys of blocks begin with

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=_order)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running) or self.apart is not None

    def schedule(self, drafter: Drafter | None = None) -> Step:
        """The next step; call only while :attr:`busy`. Its blocks count as computed: see :meth:`give_up`."""
        step = Step()
        self._yield_to_priority()
        generating = self._generating(step)
        for sequence in generating:
            self._publish(sequence, len(sequence.tokens))
        prompts = self._prompts() if self.apart is None else []
        drafting = drafter if drafter and drafter.begin(len(generating)) else None
        for sequence in generating:
            if drafting:
                self._draft(sequence, drafting, step)
            rows = rows_of(sequence.paths) if drafting else 1
            step.work.append(Work(sequence, rows, rows))
        step.work += [w for w in prompts if w.rows or w.scores or not self.splits]
        step.apart = [w for w in prompts if not (w.rows or w.scores) and self.splits]
        self.apart = step.apart or self.apart
        return step

    def _yield_to_priority(self) -> None:
        """Preempt those of lower priority than the first that waits, while it has no place."""
        if self.apart is not None:  # nobody would be admitted
            return
        while self.waiting and self.running and self.running[-1].priority > self.waiting[0].priority:
            if len(self.running) < self.max_num_seqs and self._find(self.waiting[0]) is not None:
                break
            self._preempt(self.running[-1])

    def _generating(self, step: Step) -> list[Sequence]:
        """The sequences that lack one token, each with a place for it that no other reads."""
        for sequence in list(self.running):
            if sequence not in self.running or len(sequence.tokens) - sequence.computed > 1:
                continue
            while (missing := self._missing(sequence)) > self.allocator.num_free:
                self._preempt(self._victim())
                if sequence not in self.running:
                    break
            else:
                self._extend(sequence, missing, step)
        return [s for s in self.running if len(s.tokens) - s.computed == 1]

    def _victim(self) -> Sequence:
        """The last in order, of those whose blocks come free at once."""
        return next(s for s in reversed(self.running) if not self._is_apart(s))

    def _is_apart(self, sequence: Sequence) -> bool:
        return any(w.sequence is sequence for w in self.apart or ())

    def _missing(self, sequence: Sequence) -> int:
        at = sequence.computed // self.block_size
        if at == len(sequence.blocks):
            return 1
        return int(self.allocator.references(sequence.blocks[at]) > 1)

    def _extend(self, sequence: Sequence, missing: int, step: Step) -> None:
        at = sequence.computed // self.block_size
        new = self.allocator.allocate(missing)
        if missing and at < len(sequence.blocks):  # shared with continuations of the same prompt: copy on write
            shared = sequence.blocks[at]
            step.copies.append((shared, new[0]))
            self.allocator.release([shared])
            sequence.blocks[at] = new[0]
        else:
            sequence.blocks.extend(new)

    def _prompts(self) -> list[Work]:
        """Chunks of the prompts that run and of those that can join, in order, under the budget."""
        budget, scored = self.max_batched_tokens, _SCORED_TOKENS
        work = []
        for sequence in self._in_order():
            left = len(sequence.tokens) - sequence.computed
            apart = self.splits and left > 1 and not sequence.scoring
            count = min(left - apart, budget, scored if sequence.scoring else left)
            if not count:  # its place is kept
                continue
            work.append(Work(sequence, count, int(count == left), sequence.scoring))
            if not apart:
                self._publish(sequence, sequence.computed + count)
            budget -= count
            scored -= count if sequence.scoring else 0
            if not budget:
                break
        return work

    def _in_order(self) -> Iterator[Sequence]:
        prompts = deque(s for s in self.running if len(s.tokens) - s.computed > 1)
        while prompts or self.waiting:
            first = self.waiting[0] if self.waiting else None
            if first and not (prompts and _order(prompts[0]) < _order(first)) and self._admit(first):
                yield self.waiting.pop(0)
            elif prompts:
                yield prompts.popleft()
            else:
                return

    def _admit(self, sequence: Sequence) -> bool:
        found = self._find(sequence) if len(self.running) < self.max_num_seqs else None
        if found is None:
            return False
        self.allocator.share(found)
        missing = self._blocks_for(len(sequence.tokens)) - len(found)
        sequence.blocks = array("i", found + self.allocator.allocate(missing))
        sequence.computed = len(found) * self.block_size
        sequence.published = len(found)
        self.found_tokens += sequence.computed
        bisect.insort(self.running, sequence, key=_order)
        return True

    def _find(self, sequence: Sequence) -> list[int] | None:
        """Blocks that hold the sequence's first tokens already; None if there is no room for the others.

        Its last token is always computed: the logits after it are wanted.
        """
        wanted = 0 if sequence.scoring else (len(sequence.tokens) - 1) // self.block_size
        found = self.allocator.find(self._keys(sequence, wanted))
        unheld = sum(not self.allocator.references(b) for b in found)
        needed = self._blocks_for(len(sequence.tokens)) - len(found)
        return found if needed <= self.allocator.num_free - unheld else None

    def _keys(self, sequence: Sequence, count: int) -> list[bytes]:
        """Of the sequence's first ``count`` blocks."""
        root = self._root + (b" adapter %d" % sequence.adapter.number if sequence.adapter else b"")
        if sequence.root != root:
            sequence.root, sequence.keys = root, []
        keys, size = sequence.keys, self.block_size
        for i in range(len(keys), count):
            keys.append(chain_key(keys[-1] if keys else root, sequence.tokens[i * size : (i + 1) * size]))
        return keys[:count]

    def _publish(self, sequence: Sequence, end: int) -> None:
        """Let the blocks be found that are full when the step has computed the tokens before ``end``."""
        full = end // self.block_size
        if full > sequence.published:
            keys = self._keys(sequence, full)
            for i in range(sequence.published, full):
                self.allocator.publish(sequence.blocks[i], keys[i])
            sequence.published = full

    def _draft(self, sequence: Sequence, drafter: Drafter, step: Step) -> None:
        """Ask for drafts, as many as the limit and the blocks that nobody else needs now have room for."""
        if sequence.siblings:  # they begin with what is computed now
            return
        room = (len(sequence.blocks) + self.allocator.num_free) * self.block_size - len(sequence.tokens)
        # All drafts and the draw after them may be kept.
        limit = min(room, sequence.limit - len(sequence.tokens) - 1)
        paths = [path[:limit] for path in drafter.propose(sequence, limit)] if limit > 0 else []
        if not paths:
            return
        sequence.draft = paths[0]
        end = len(sequence.tokens) + len(sequence.draft)
        sequence.blocks.extend(self.allocator.allocate(max(0, self._blocks_for(end) - len(sequence.blocks))))
        for path in paths[1:]:
            self._guess_apart(sequence, path, step)

    def _guess_apart(self, sequence: Sequence, path: list[int], step: Step) -> None:
        """A fork for another path, if there are blocks for it."""
        shared = sequence.computed // self.block_size
        missing = self._blocks_for(len(sequence.tokens) + len(path)) - shared
        if missing > self.allocator.num_free:
            return
        own = self.allocator.allocate(missing)
        if sequence.computed % self.block_size:
            step.copies.append((sequence.blocks[shared], own[0]))
        sequence.forks.append(Fork(path, sequence.blocks[:shared] + array("i", own), shared))

    def advanced(self, sequence: Sequence, best: int = 0) -> None:
        """After a step: go back to the tokens that were kept, those of the ``best`` path, and return all blocks but
        theirs."""
        if sequence.forks:
            self._join(sequence, best)
        sequence.computed = min(sequence.computed, len(sequence.tokens) - 1)
        keep = self._blocks_for(sequence.computed)
        self.allocator.release(sequence.blocks[keep:])
        del sequence.blocks[keep:]
        sequence.draft = []

    def _join(self, sequence: Sequence, best: int) -> None:
        """End the forks: the sequence goes on with the blocks of the best path."""
        for number, fork in enumerate(sequence.forks, 1):
            own = fork.blocks[fork.shared :]
            if number == best:
                # A block that can be found, full with the last token, stays: alone in the cache it might be evicted.
                begin = max(fork.shared, sequence.published)
                own[begin - fork.shared :], sequence.blocks[begin:] = sequence.blocks[begin:], fork.blocks[begin:]
            self.allocator.release(own)
        sequence.forks = []

    def landed(self) -> None:
        """The job that ran apart is over."""
        for w in self.apart or ():
            w.sequence.computed += w.count
            self._publish(w.sequence, w.sequence.computed)
        self.apart = None
        self.allocator.release(self._left_behind)
        self._left_behind = []

    def fork(self, parent: Sequence, child: Sequence) -> bool:
        """Start ``child`` on the computed prompt of ``parent``, sharing its blocks until one of them writes.

        A child for which there is no place joins the waiting ones and finds, or computes, its prompt itself.
        """
        if len(self.running) >= self.max_num_seqs:
            self.add(child)
            return False
        child.blocks = parent.blocks[:]
        self.allocator.share(child.blocks)
        child.computed, child.published = parent.computed, parent.published
        bisect.insort(self.running, child, key=_order)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.remove(sequence)
        self.add(sequence)
        self.preemptions += 1

    def give_up(self, everyone: Iterable[Sequence] | None = None) -> None:
        """A step that was scheduled did not run: compute everything again, and find nothing that it was to fill.

        Nor does anything run apart any more.

        Args:
            everyone: what there is to compute, where an error came between two changes to what is known here.
        """
        self.apart, self._left_behind = None, []
        self.waiting = sorted([*self.waiting, *self.running] if everyone is None else everyone, key=_order)
        self.running = []
        for sequence in self.waiting:
            sequence.leave()
        self.allocator.clear()

    def renew(self, version: int) -> None:
        """The weights are new: compute everything again.

        What the old ones left can no longer be found, and is evicted first: all of it was let go before anything new.
        """
        for sequence in list(self.running):
            self.remove(sequence)
            self.add(sequence)
        for sequence in self.waiting:
            if not sequence.generated:
                sequence.prompt_logprobs = [None]  # all of them from the same weights
        self._root = f"weights {version}".encode()

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and return its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
            if self._is_apart(sequence):
                self.apart = [w for w in self.apart or () if w.sequence is not sequence]
                self._left_behind += sequence.blocks
            else:
                self.allocator.release(sequence.blocks)
            sequence.leave()
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.priority, sequence.arrival, sequence.index
