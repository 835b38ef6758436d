"""How the text ops take their texts and options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = torch.Tensor | npt.NDArray[Any]

# N strings, or (data uint8 [bytes], offsets int64 [N + 1]): text i is the UTF-8 data[offsets[i] : offsets[i + 1]], the
# layout of Arrow's large_string. The arrays are read in place.
Texts = Sequence[str] | tuple[Array, Array]

UNITS = ("word", "char")


def native(op: str, texts: Texts) -> tuple[Any, Array | None, int]:
    """What the binding takes, (texts, offsets or None), and the number of texts."""
    if isinstance(texts, str | bytes):
        raise ValueError(f"{op}: texts: expected a sequence of str or (data, offsets), got {type(texts).__name__}")
    if isinstance(texts, tuple) and len(texts) == 2 and isinstance(texts[1], np.ndarray | torch.Tensor):
        data, offsets = texts
        for name, array, kinds in (
            ("data", data, (np.dtype(np.uint8), torch.uint8)),
            ("offsets", offsets, (np.dtype(np.int64), torch.int64)),
        ):
            if not isinstance(array, np.ndarray | torch.Tensor) or array.dtype not in kinds or array.ndim != 1:
                got = f"{array.dtype}{list(array.shape)}" if hasattr(array, "dtype") else type(array).__name__
                raise ValueError(f"{op}: texts: expected {name} as {kinds[0]}[1 dimension], got {got}")
        if len(offsets) == 0:
            raise ValueError(f"{op}: texts: expected offsets int64 [N + 1], got none")
        return data, offsets, len(offsets) - 1
    items = tuple(texts)
    return items, None, len(items)


def check_unit(op: str, unit: str) -> bool:
    """Whether the unit is a character."""
    if unit not in UNITS:
        raise ValueError(f"{op}: unit: expected one of {UNITS}, got {unit!r}")
    return unit == "char"


def check_minhash(op: str, num_perm: int, seed: int) -> None:
    if num_perm < 1:
        raise ValueError(f"{op}: num_perm: expected >= 1, got {num_perm}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"{op}: seed: expected an integer in [0, 2^64), got {seed}")


def check_max_cluster(op: str, max_cluster: int | None) -> int:
    """The binding's way to say None: 0."""
    if max_cluster is None:
        return 0
    if max_cluster < 1:
        raise ValueError(f"{op}: max_cluster: expected None or >= 1, got {max_cluster}")
    return max_cluster
