"""How the ops on texts and arrays take them, and their options, without importing torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch
    from typing_extensions import TypeIs

Array: TypeAlias = "torch.Tensor | npt.NDArray[Any]"

# N strings, or (data uint8 [bytes], offsets int64 [N + 1]): text i is the UTF-8 data[offsets[i] : offsets[i + 1]], the
# layout of Arrow's large_string. The arrays are read in place.
Texts: TypeAlias = "Sequence[str] | tuple[Array, Array]"

UNITS = ("word", "char")


def is_tensor(value: Any) -> TypeIs[torch.Tensor]:
    """Whether it is a torch tensor; there is none where nobody has imported torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_array(value: Any) -> TypeIs[Array]:
    return isinstance(value, np.ndarray) or is_tensor(value)


def dtype_name(array: Array) -> str:
    """ "int64" for numpy's and for torch's."""
    return str(array.dtype).removeprefix("torch.")


def native(op: str, texts: Texts) -> tuple[Any, Array | None, int]:
    """What the binding takes, (texts, offsets or None), and the number of texts."""
    if isinstance(texts, str | bytes):
        raise ValueError(f"{op}: texts: expected a sequence of str or (data, offsets), got {type(texts).__name__}")
    if isinstance(texts, tuple) and len(texts) == 2 and is_array(texts[1]):
        data, offsets = texts
        for name, array, dtype in (("data", data, "uint8"), ("offsets", offsets, "int64")):
            if not is_array(array) or dtype_name(array) != dtype or array.ndim != 1:
                got = f"{array.dtype}{list(array.shape)}" if hasattr(array, "dtype") else type(array).__name__
                raise ValueError(f"{op}: texts: expected {name} as {dtype}[1 dimension], got {got}")
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
