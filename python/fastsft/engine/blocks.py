"""Who holds which block of the key-value cache."""

from __future__ import annotations


class OutOfBlocks(RuntimeError):
    """The cache is full; the scheduler preempts a sequence and tries again."""


class BlockAllocator:
    """Hands out block numbers. A block may belong to several sequences, which then only read it."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """``count`` blocks with one reference each, or none at all (OutOfBlocks)."""
        if count > len(self._free):
            raise OutOfBlocks
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._references[block] = 1
        return taken

    def share(self, blocks: list[int]) -> None:
        for block in blocks:
            self._references[block] += 1

    def release(self, blocks: list[int]) -> None:
        for block in blocks:
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)
