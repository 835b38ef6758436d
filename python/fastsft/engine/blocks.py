"""Who holds which block of the key-value cache, and which blocks' contents can be found again."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


class OutOfBlocks(RuntimeError):
    """The cache is full; the scheduler preempts a sequence and tries again."""


def chain_key(parent: bytes, tokens: Iterable[int]) -> bytes:
    """Names a full block by its tokens and, through ``parent``, by all before them and the weights they went through.

    128 bits of BLAKE2b: two prefixes that share a key are not to be met with.
    """
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockAllocator:
    """Counts references to blocks. A block may belong to several sequences, which then only read it.

    A full block can be published under a key. When nobody holds it any more it stays findable until its place is
    needed: blocks without a key are handed out first, then the published one that was let go the longest ago.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.evictions = 0
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # published, held by nobody; the first goes first
        self._references = [0] * num_blocks
        self._blocks: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, the published ones that nobody holds among them."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def references(self, block: int) -> int:
        return self._references[block]

    def allocate(self, count: int) -> list[int]:
        """``count`` blocks with one reference each, or none at all (OutOfBlocks)."""
        if count > self.num_free:
            raise OutOfBlocks
        taken = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in taken:
            self._references[block] = 1
        return taken

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        del self._blocks[self._keys.pop(block)]
        self.evictions += 1
        return block

    def share(self, blocks: Sequence[int]) -> None:
        """One more reference to each, be it held or found."""
        for block in blocks:
            if not self._references[block]:
                del self._cached[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less to each. The last goes first: a block is no use to who cannot find the one before it."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if not self._references[block]:
                if block in self._keys:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def publish(self, block: int, key: bytes) -> None:
        """Let a held block be found; nothing happens where another one has the same contents."""
        if key not in self._blocks:
            self._blocks[key] = block
            self._keys[block] = key

    def find(self, keys: list[bytes]) -> list[int]:
        """The blocks of as many of the first keys as there are. Nobody holds them for the caller: share() does."""
        found = []
        for key in keys:
            if (block := self._blocks.get(key)) is None:
                break
            found.append(block)
        return found

    def clear(self) -> None:
        """Take all blocks from whoever holds them, and make all contents unfindable."""
        self._free = list(range(self.num_blocks - 1, -1, -1))
        self._references = [0] * self.num_blocks
        self._cached.clear()
        self._blocks.clear()
        self._keys.clear()
