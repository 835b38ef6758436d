"""Which samples of which source an epoch has: a function of (seed, epoch), so that a resumed run seeks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from fastsft.config import ConfigError, DataOptions, SourceOptions


def sources_of(options: DataOptions) -> list[SourceOptions]:
    """The sources of a run; ``data.train`` is short for a single one."""
    if options.sources:
        return list(options.sources)
    return [SourceOptions(name="train", files=options.train, format=options.format, fields=options.fields)]


def passes(options: DataOptions, counts: Sequence[int], *, table: str = "data.ratios") -> list[Fraction]:
    """How often an epoch goes through each source, which has ``counts[i]`` samples.

    With ``data.ratios``, the samples of the tags stand in these ratios: the tag that has the fewest for its ratio keeps
    the weights of its sources, those of the others are scaled down.

    Args:
        table: where the ratios stand, for errors.

    Raises:
        ConfigError: a tag without a ratio, or a ratio whose tag has no sample.
    """
    sources = sources_of(options)
    weights = [Fraction(str(source.weight)) for source in sources]
    if not options.ratios:
        return weights
    sizes: dict[str, Fraction] = {}
    for source, weight, count in zip(sources, weights, counts, strict=True):
        sizes[source.tag] = sizes.get(source.tag, Fraction(0)) + weight * count
    _check_tags(sizes, options.ratios, table)
    ratios = {tag: Fraction(str(ratio)) for tag, ratio in options.ratios.items()}
    unit = min(sizes[tag] / ratio for tag, ratio in ratios.items())
    return [w * unit * ratios[s.tag] / sizes[s.tag] for s, w in zip(sources, weights, strict=True)]


def _check_tags(sizes: Mapping[str, Fraction], ratios: Mapping[str, float], table: str) -> None:
    for tag in sizes:
        if tag not in ratios:
            raise ConfigError(f"{table}: expected a ratio for the tag {tag!r}, got {', '.join(ratios)}")
    for tag in ratios:
        if not sizes.get(tag):
            raise ConfigError(f"{table}: no sample has the tag {tag!r}")


class Mixture:
    """Draws each epoch's samples.

    A source is gone through again and again, each time in another order; epoch ``e`` has the stretch from ``e`` to
    ``e + 1`` times ``weight * size`` of that. So a source of weight 1 is there once in every epoch, of weight 0.5 it is
    one half in one epoch and the other half in the next, and of weight 2 all of it twice.

    Args:
        origins: int [N], each sample's source.
        weights: passes through each source in an epoch, at least 0.
    """

    def __init__(self, origins: npt.NDArray[np.integer], weights: Sequence[Fraction], *, seed: int) -> None:
        if len(origins) and int(origins.max()) >= len(weights):
            raise ValueError(f"Mixture: expected {int(origins.max()) + 1} weights, got {len(weights)}")
        self._members = [np.flatnonzero(origins == i) for i in range(len(weights))]
        self._weights, self._seed = list(weights), seed

    def draw(self, epoch: int) -> npt.NDArray[np.int64]:
        """The numbers of the samples of an epoch, source by source; more than once where the weight is above 1."""
        parts = [self._draw(source, epoch) for source in range(len(self._members))]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def _draw(self, source: int, epoch: int) -> npt.NDArray[np.int64]:
        begin, end = (int(e * self._weights[source] * len(self._members[source])) for e in (epoch, epoch + 1))
        return self.take(source, begin, end)

    def take(self, source: int, begin: int, end: int) -> npt.NDArray[np.int64]:
        """The numbers of a source's samples from the ``begin``-th to before the ``end``-th, counted over its passes."""
        members = self._members[source]
        size = len(members)
        parts = []
        while begin < end:
            number, first = divmod(begin, size)
            last = min(size, first + end - begin)
            # The whole of a pass needs no order: the loader makes its own.
            part = members if last - first == size else members[self._order(source, number)[first:last]]
            parts.append(np.sort(part))
            begin += last - first
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def _order(self, source: int, number: int) -> npt.NDArray[np.int64]:
        # Another part of the counter than the loader's own draws, which begin at 0.
        philox = np.random.Philox(key=[self._seed, number], counter=[0, 0, 0, 1 + source])
        return np.random.Generator(philox).permutation(len(self._members[source]))
