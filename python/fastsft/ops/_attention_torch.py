"""varlen_attention in plain torch, where a device has no kernel: the reference's formula, in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsft.ops import reference
from fastsft.ops._attention_inputs import check_offsets, reference_options


def torch_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, plan: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    del plan
    check_offsets("varlen_attention", "cu_seqlens_q", cu_q, q.shape[0])
    check_offsets("varlen_attention", "cu_seqlens_k", cu_k, k.shape[0])
    q32, k32, v32 = q.float(), k.float(), v.float()
    out, lse = reference.varlen_attention(q32, k32, v32, cu_q, cu_k, **reference_options(*options))
    return out.to(q.dtype), lse.contiguous()


def torch_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    cu_q: Tensor,
    cu_k: Tensor,
    plan: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    del plan
    if cu_q.numel() == 1:  # no sequence, hence no graph to differentiate
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    with torch.enable_grad():
        q32, k32, v32 = (x.detach().float().requires_grad_() for x in (q, k, v))
        outputs = reference.varlen_attention(q32, k32, v32, cu_q, cu_k, **reference_options(*options))
        # A row that sees no key has no gradient, whatever comes from above.
        dlse = torch.zeros_like(lse) if dlse is None else torch.where(lse.isneginf(), 0.0, dlse)
        dq, dk, dv = torch.autograd.grad(outputs, (q32, k32, v32), (dout.float(), dlse))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
