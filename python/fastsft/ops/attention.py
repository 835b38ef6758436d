"""Attention over packed sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsft import _C
from fastsft.ops._attention_inputs import (
    CUDA_DTYPES,
    HAS_CUDA,
    NO_CUDA,
    SCHEMA_OPTIONS,
    aligned,
    check_heads,
    check_int32,
    checked_options,
    checked_window,
)
from fastsft.ops._attention_torch import torch_backward, torch_forward
from fastsft.ops._library import define
from fastsft.ops._registry import Implementation
from fastsft.ops._require import require

CUDA_HEAD_DIMS = (64, 80, 96, 128, 256)
_PLAN_TILE = 128  # rows of a tile of the plan; kPlanTile in attention.h
_PLAN_ON_CUDA = Implementation(
    "native",
    "CUDA kernels for bfloat16 and float16, head sizes 64, 80, 96, 128, 256, not yet run on a GPU; "
    "plain torch for float32 and head size 32",
)


def _on_cuda(hopper_head_dims: str) -> Implementation:
    """The kernels by device: sm_90a code serves these head sizes, sm_80 code everything else."""
    if "90a" in _C.cuda_architectures():
        kernels = f"the sm_90a kernels for head sizes {hopper_head_dims}, the sm_80 kernels for the others"
    else:
        kernels = "the sm_80 kernels, as this build has no sm_90a code"
    return Implementation("native", f"{_PLAN_ON_CUDA.reason}; on compute capability 9.0 {kernels}")


@dataclass(frozen=True)
class AttentionPlan:
    """Which keys every packed row sees and the order of the tiles, for the CUDA kernels; see :func:`attention_plan`."""

    memory: Tensor
    total_q: int
    total_k: int
    causal: bool
    window: tuple[int, int]


def attention_plan(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    total_q: int,
    total_k: int | None = None,
    causal: bool = True,
    window: tuple[int, int] | None = None,
) -> AttentionPlan:
    """What :func:`varlen_attention` needs to know of a batch and its mask, computed once on the device.

    One plan serves every layer with the same mask, forward and backward. It is made without waiting for the device and
    its size follows from the shapes, so that it can be part of a CUDA graph. Kernels on a CPU need none: there it is
    empty.

    Args:
        cu_seqlens_q, cu_seqlens_k, causal, window: as for :func:`varlen_attention`.
        total_q, total_k: packed queries and keys; ``total_q`` keys when not given.

    Raises:
        ValueError: for a dtype or window outside the contract.
    """
    cu_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    check_int32("attention_plan", cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_k)
    left, right = checked_window("attention_plan", window)
    total_k = total_q if total_k is None else total_k
    memory = _plan(cu_seqlens_q, cu_k, total_q, total_k, causal, left, right)
    return AttentionPlan(memory, total_q, total_k, causal, (left, right))


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    deterministic: bool = False,
    return_lse: bool = False,
    plan: AttentionPlan | None = None,
) -> Any:
    """Exact attention within each of B packed sequences, with gradients for q, k and v.

    Work follows the tokens: tiles cover the packed axis, so that neither padding nor the number or the longest of the
    sequences costs anything. Forward is the online softmax of FlashAttention (Dao et al., 2022, arXiv 2205.14135);
    backward recomputes the probabilities from the saved log-sum-exp.

    Args:
        q: ``[Tq, Hq, D]``; float32, bfloat16 or float16; D in 32, 64, 80, 96, 128, 256. Like k and v it may be a
            strided view (a slice of a fused projection) as long as its last dimension is contiguous; nothing is copied.
        k, v: ``[Tk, Hkv, D]`` of the same dtype; Hq must be a multiple of Hkv, and query head h reads key head
            ``h // (Hq // Hkv)``.
        cu_seqlens_q: int32 ``[B + 1]``, from 0 ascending to Tq; sequence b owns queries
            ``cu_seqlens_q[b]:cu_seqlens_q[b + 1]``. Sequences may be empty.
        cu_seqlens_k: the same for the keys; ``cu_seqlens_q`` when not given.
        causal: a query sees no later key. Where a sequence has len_q queries and len_k keys, query i stands at key
            position ``i + len_k - len_q`` (bottom-right alignment).
        scale: factor on the scores; ``1 / sqrt(D)`` when not given.
        window: ``(left, right)``: keys from ``left`` before to ``right`` after the query's position; -1 is unbounded.
        softcap: when > 0, scores become ``softcap * tanh(score / softcap)``.
        deterministic: accepted for interfaces that pass it. The result never depends on timing or the number of
            threads, so it changes nothing.
        return_lse: also return the log-sum-exp of each query's scores.
        plan: what :func:`attention_plan` made of the same offsets and mask, to spare making it anew in every layer. It
            matters to the CUDA kernels only.

    On a CUDA device the offsets are not checked (that would wait for the device): wrong ones give wrong results.

    Returns:
        ``out``, contiguous, of q's shape and dtype; with ``return_lse`` the pair ``(out, lse)``, lse float32
        ``[Hq, Tq]``, differentiable too. A query that sees no key has output 0, lse ``-inf`` and gradient 0.

    Raises:
        ValueError: for a shape, dtype, offset or option outside the above.
    """
    del deterministic
    op = "varlen_attention"
    if cu_seqlens_k is cu_seqlens_q:
        cu_seqlens_k = None  # torch.compile refuses the same tensor twice in one autograd.Function call
    cu_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    check_heads(op, q, k, v, "k", 3)
    check_int32(op, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_k)
    options = checked_options(op, q, causal, scale, window, softcap)
    if plan is None and q.is_cuda:
        plan = attention_plan(
            cu_seqlens_q, cu_seqlens_k, total_q=q.shape[0], total_k=k.shape[0], causal=causal, window=window
        )
    memory = None if plan is None else _plan_memory(op, plan, q, k, causal, options[2:4])
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out, lse = _VarlenAttention.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, memory, *options)  # type: ignore[no-untyped-call]
    else:
        out, lse = _forward(q, k, v, cu_seqlens_q, cu_k, memory, *options)
    return (out, lse) if return_lse else out


def _plan_memory(
    op: str, plan: AttentionPlan, q: Tensor, k: Tensor, causal: bool, window: tuple[int, ...]
) -> Tensor | None:
    made_for = (plan.total_q, plan.total_k, plan.causal, plan.window)
    wanted = (q.shape[0], k.shape[0], causal, window)
    names = "(total_q, total_k, causal, window)"
    require(made_for == wanted, op, "plan", f"one for {names} = {wanted}", made_for)
    require(plan.memory.device == q.device, op, "plan", f"one on {q.device}", plan.memory.device)
    return plan.memory if q.is_cuda else None


# --- native -----------------------------------------------------------------------------------------------------------


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _native_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, plan: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    outputs = _fake_forward(q, k, v, cu_q, cu_k)
    _C.varlen_attention_fwd(q, k, v, cu_q, cu_k, plan, *(*options, *outputs))
    return outputs


def _fake_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _native_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _fake_backward(dout, q, k, v)
    delta = lse.new_empty(lse.shape) if q.is_cuda else None
    if dout.stride(-1) != 1:  # the gradient of a sum is an expanded scalar
        dout = dout.contiguous()
    if dlse is not None:
        dlse = dlse.contiguous()
    _C.varlen_attention_bwd(dout, q, k, v, out, lse, dlse, *(*rest, delta, *gradients))
    return gradients


# --- CUDA: native for 16-bit types, plain torch for the rest ---------------------------------------------------------


def _fake_plan(cu_q: Tensor, cu_k: Tensor, total_q: int, total_k: int, *_: Any) -> Tensor:
    if not cu_q.is_cuda:
        return cu_q.new_empty(0)
    tiles_q, tiles_k = -(-total_q // _PLAN_TILE), -(-total_k // _PLAN_TILE)
    return cu_q.new_empty(2 * (total_q + total_k) + 2 * (2 * tiles_q + tiles_k))


def _cuda_plan(cu_q: Tensor, cu_k: Tensor, total_q: int, total_k: int, causal: bool, left: int, right: int) -> Tensor:
    plan = _fake_plan(cu_q, cu_k, total_q, total_k)
    if HAS_CUDA:
        _C.attention_plan(cu_q, cu_k, total_q, total_k, causal, left, right, plan)
    return plan


def _has_kernel(q: Tensor) -> bool:
    return HAS_CUDA and q.dtype in CUDA_DTYPES and q.shape[-1] in CUDA_HEAD_DIMS


def _cuda_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, plan: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    if not _has_kernel(q):
        return torch_forward(q, k, v, cu_q, cu_k, plan, *options)
    q, k, v = aligned(q, k, v)
    return _native_forward(q, k, v, cu_q, cu_k, plan, *options)


def _cuda_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if not _has_kernel(q):
        return torch_backward(dout, q, k, v, out, *rest)
    dout, q, k, v, out = aligned(dout, q, k, v, out)
    return _native_backward(dout, q, k, v, out, *rest)


# --- registration -----------------------------------------------------------------------------------------------------

_plan = define(
    "attention_plan(Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt total_q, SymInt total_k, bool causal, "
    "int window_left, int window_right) -> Tensor",
    fake=_fake_plan,
    cpu=_fake_plan,
    cuda=_cuda_plan,
    cpu_is=Implementation("none", "kernels on a CPU need no plan"),
    cuda_is=_PLAN_ON_CUDA if HAS_CUDA else Implementation("none", "this build has no CUDA kernels"),
)
_forward = define(
    "varlen_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? plan, "
    f"{SCHEMA_OPTIONS}) -> (Tensor, Tensor)",
    fake=_fake_forward,
    cpu=_native_forward,
    cuda=_cuda_forward,
    cuda_is=_on_cuda("64, 128 and 256") if HAS_CUDA else NO_CUDA,
)
_backward = define(
    "varlen_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse, "
    f"Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? plan, {SCHEMA_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    cpu=_native_backward,
    cuda=_cuda_backward,
    cuda_is=_on_cuda("64 and 128") if HAS_CUDA else NO_CUDA,
)


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor | None, plan: Tensor | None, *options: Any
    ) -> Any:
        out, lse = _forward(q, k, v, cu_q, cu_q if cu_k is None else cu_k, plan, *options)
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k, plan)
        ctx.options = options
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> Any:
        q, k, v, out, lse, cu_q, cu_k, plan = ctx.saved_tensors
        cu_k = cu_q if cu_k is None else cu_k
        gradients = _backward(dout, q, k, v, out, lse, dlse, cu_q, cu_k, plan, *ctx.options)
        return (*gradients, None, None, None, *(None for _ in ctx.options))
