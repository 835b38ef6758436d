"""What the machine can do at most: measured once per run and number of threads, when a bench first asks for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROUNDS = 9
ARRAY = 2**26  # float32: 256 MiB, beyond every cache
SIZE = 2048  # of the product's matrices


class Limits:
    """``stream``: bytes per second of a sum of an array on huge pages, as weights and caches are here; ``copy``: of a
    copy, read and written; ``product <dtype>``: floating-point operations per second of a large matrix product, torch's
    or fastsft's, whichever is faster. All at torch's number of threads, which has to be fastsft's too.

    ``measured``: threads -> limit -> rate, of those that were asked for.
    """

    def __init__(self) -> None:
        self.measured: dict[str, dict[str, float]] = {}

    def stream(self) -> float:
        import torch

        from fastsft.ops._memory import large_empty

        def rate() -> float:
            source = large_empty(ARRAY, torch.empty(0)).fill_(1)
            return source.nbytes / _seconds(source.sum)

        return self._once("stream", rate)

    def copy(self) -> float:
        import torch

        def rate() -> float:
            source, target = torch.ones(ARRAY // 2), torch.empty(ARRAY // 2)
            return 2 * source.nbytes / _seconds(lambda: target.copy_(source))

        return self._once("copy", rate)

    def product(self, dtype: torch.dtype) -> float:
        import torch

        from fastsft.ops.gemm import product

        def rate() -> float:
            a, b, out = (torch.randn(SIZE, SIZE).to(dtype) for _ in range(3))
            theirs = _seconds(lambda: torch.mm(a, b, out=out))
            return 2 * SIZE**3 / min(theirs, _seconds(lambda: product(a, b, out)))

        return self._once(f"product {str(dtype).removeprefix('torch.')}", rate)

    def share_bytes(self, benchmark: Any, *, read: float = 0, copied: float = 0) -> None:
        """Note what of the limits a round came to that had to read so many bytes, or to read and write so many in sum.
        Nothing is noted where nothing was timed (--benchmark-disable)."""
        if benchmark.stats and read:
            benchmark.extra_info["share_of_stream"] = read / benchmark.stats["median"] / self.stream()
        if benchmark.stats and copied:
            benchmark.extra_info["share_of_copy"] = copied / benchmark.stats["median"] / self.copy()

    def share_flops(self, benchmark: Any, flops: float, dtype: torch.dtype) -> None:
        """The same of a round that had to do so many operations in ``dtype``."""
        if benchmark.stats:
            benchmark.extra_info["share_of_product"] = flops / benchmark.stats["median"] / self.product(dtype)

    def _once(self, name: str, rate: Callable[[], float]) -> float:
        import torch

        rates = self.measured.setdefault(str(torch.get_num_threads()), {})
        if name not in rates:
            rates[name] = rate()
        return rates[name]


def _seconds(function: Callable[[], object]) -> float:
    """Of the fastest call: a limit is what the machine does when nothing disturbs it."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)
