"""What each token of a sample is. Its loss weight is a look-up: that of its segment, times the turn's and the row's."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastsft.config import WeightOptions
from fastsft.models.template import Span


class Segment(enum.IntEnum):
    """Named as in ``data.weights``, which says what each is. Stores hold the numbers."""

    PROMPT = 0
    THINKING = 1
    ANSWER = 2
    TOOL_CALLS = 3
    CONTROL = 4

    @property
    def label(self) -> str:
        return self.name.lower()


class Range(NamedTuple):
    """Characters of a text, half-open, that are of one segment; ``weight`` multiplies the segment's."""

    begin: int
    end: int
    segment: Segment
    weight: float = 1.0


class Part(NamedTuple):
    """Tokens of a sample, and of each its loss weight and its segment."""

    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    segments: npt.NDArray[np.uint8]

    def take(self, kept: slice) -> Part:
        return Part(self.ids[kept], self.weights[kept], self.segments[kept])


def join(parts: Sequence[Part]) -> Part:
    ids, weights, segments = zip(*parts, strict=True)
    return Part(np.concatenate(ids), np.concatenate(weights), np.concatenate(segments))


def weigh(
    ids: Sequence[int] | npt.NDArray[np.int32],
    segments: npt.NDArray[np.uint8] | Segment,
    options: WeightOptions,
    *factors: npt.NDArray[np.float64] | float,
) -> Part:
    """Tokens of these segments, one for all or one of each; the weights are multiplied by the factors in turn."""
    found = np.asarray(ids, np.int32)
    kinds = np.full(found.shape, segments, np.uint8)
    weights = np.array([getattr(options, segment.label) for segment in Segment], np.float64)[kinds]
    for factor in factors:
        weights *= factor
    return Part(found, weights.astype(np.float32), kinds)


def token_segments(
    offsets: Sequence[Span], ranges: Sequence[Range], outside: Segment
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
    """Segment and factor of each token: those of the first range of which it covers a character (transformers' rule),
    else ``outside`` and 1.

    ``ranges`` and ``offsets`` ascend.
    """
    spans = np.array(offsets, np.int64).reshape(-1, 2)
    never = np.iinfo(np.int64).max
    begins, ends, kinds, factors = zip(*ranges, Range(never, never, outside), strict=True)
    at = np.searchsorted(np.array(ends), spans[:, 0], side="right")
    inside = np.array(begins)[at] < spans[:, 1]
    segments = np.where(inside, np.array(kinds, np.uint8)[at], np.uint8(outside))
    return segments, np.where(inside, np.array(factors, np.float64)[at], 1.0)
