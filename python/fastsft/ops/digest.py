"""Digests of texts, to find equal ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fastsft import _C
from fastsft.ops import _registry, _texts
from fastsft.ops._texts import Texts


def text_digests(texts: Texts) -> npt.NDArray[np.uint64]:
    """128 bits per text, equal for equal bytes. Not cryptographic: two different texts have equal digests with
    probability 2^-128, unless someone made them so. The formula is in ``digest.h`` and does not change.

    Args:
        texts: N strings; or their UTF-8 as (data uint8 [bytes], offsets int64 [N + 1]), read in place: text i is
            ``data[offsets[i] : offsets[i + 1]]``.

    Returns:
        uint64 [N, 2]; the same on every machine.

    Raises:
        ValueError: an element is not a string or holds a lone surrogate; broken offsets.
    """
    data, offsets, count = _texts.native("text_digests", texts)
    digests = np.empty((count, 2), np.uint64)
    _C.text_digests(data, offsets, digests)
    return digests


_registry.record(
    "text_digests",
    cpu=_registry.Implementation("native", "C++ kernel"),
    cuda=_registry.Implementation("none", "texts live on the host"),
)
