"""What attention over packed sequences and over a block cache have in common: options and the checks of arguments.

The checks hold on every device. Offsets and block ids are checked where their values are read.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastsft import _C
from fastsft.ops._registry import Implementation
from fastsft.ops._require import require

HEAD_DIMS = (32, 64, 80, 96, 128, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA_DTYPES = (torch.bfloat16, torch.float16)

SCHEMA_OPTIONS = "bool causal, float scale, int window_left, int window_right, float softcap"
HAS_CUDA = bool(_C.cuda_architectures())
NO_CUDA = Implementation("torch", "one sequence at a time: this build has no CUDA kernels")


def check_heads(op: str, q: Tensor, k: Tensor, v: Tensor, k_name: str, k_dims: int) -> None:
    v_name = k_name.replace("k", "v", 1)
    require(q.dim() == 3, op, "q", "[Tq, Hq, D]", list(q.shape))
    require(k.dim() == k_dims, op, k_name, f"{k_dims} dimensions", list(k.shape))
    require(v.shape == k.shape, op, v_name, f"the shape of {k_name}, {list(k.shape)}", list(v.shape))
    require(q.dtype in DTYPES, op, "q", "float32, bfloat16 or float16", q.dtype)
    require(k.dtype == q.dtype, op, k_name, str(q.dtype), k.dtype)
    require(v.dtype == q.dtype, op, v_name, str(q.dtype), v.dtype)
    require(q.shape[-1] in HEAD_DIMS, op, "q", f"a head size in {HEAD_DIMS}", q.shape[-1])
    require(k.shape[-1] == q.shape[-1], op, k_name, f"head size {q.shape[-1]}", k.shape[-1])
    heads_q, heads_k = q.shape[1], k.shape[-2]
    require(
        heads_k > 0 and heads_q > 0 and heads_q % heads_k == 0,
        op, "q", f"a number of heads that is a multiple of the key heads ({heads_k})", heads_q,
    )  # fmt: skip


def check_int32(op: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        require(tensor.dtype == torch.int32, op, name, "int32", tensor.dtype)


def checked_options(
    op: str, q: Tensor, causal: bool, scale: float | None, window: tuple[int, int] | None, softcap: float
) -> tuple[bool, float, int, int, float]:
    """The schema's trailing arguments; an absent window is (-1, -1)."""
    require(softcap >= 0 and math.isfinite(softcap), op, "softcap", "a finite number >= 0", softcap)
    left, right = checked_window(op, window)
    return causal, 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale), left, right, float(softcap)


def checked_window(op: str, window: tuple[int, int] | None) -> tuple[int, int]:
    left, right = (-1, -1) if window is None else window
    require(left >= -1 and right >= -1, op, "window", "(left, right), each >= -1", window)
    return left, right


def check_offsets(op: str, name: str, offsets: Tensor, total: int) -> None:
    bounds = offsets.tolist()
    require(
        len(bounds) > 0 and bounds[0] == 0 and bounds[-1] == total and bounds == sorted(bounds),
        op, name, f"ascending offsets from 0 to {total}", bounds,
    )  # fmt: skip


def reference_options(causal: bool, scale: float, left: int, right: int, softcap: float) -> dict[str, Any]:
    return {"causal": causal, "scale": scale, "window": (left, right), "softcap": softcap}


def aligned(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, copied where they cannot be read 16 bytes at a time."""
    return tuple(
        x
        if x.data_ptr() % 16 == 0
        and x.stride(-1) == 1
        and all(stride % 8 == 0 for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1)
        else x.clone(memory_format=torch.contiguous_format)
        for x in tensors
    )
