"""RMSNorm, SwiGLU and RoPE of transformers' models by our ops, layer by layer.

transformers writes its models by copying: where a layer's forward is, letter for letter, Llama's, it computes what
Llama's does, whatever its name. That is what is asked here, and nothing else is touched. (Its kernels mapping does the
same by names, needs a package for it, and has no rotary embedding per model.)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.models.llama import modeling_llama as llama

from fastsft import ops
from fastsft.integrations._patches import has_own_forward, original


def forwards(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, Callable[..., Any]]]:
    """The modules of a model that have a faster forward, with it."""
    ours = {_source(llama.LlamaRMSNorm): rms_norm, _source(llama.LlamaMLP): swiglu}
    ours.pop("", None)  # Llama's itself was replaced
    for module in model.modules():
        forward = ours.get(_source(type(module)))
        if forward is None or has_own_forward(module):  # it would go past what somebody has put there
            continue
        if forward is not swiglu or _is_silu(module.act_fn):
            yield module, forward


def rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    if hidden_states.dtype != self.weight.dtype:  # the product is then of the wider type, which the op does not do
        widened: Tensor = original(self)(hidden_states)
        return widened
    return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


def swiglu(self: Any, x: Tensor) -> Tensor:
    out: Tensor = self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))
    return out


def _source(kind: type) -> str:
    forward = getattr(kind, "forward", None)
    if hasattr(forward, "__wrapped__"):
        return ""  # the source is the wrapped function's, and says nothing of what wraps it
    try:
        return inspect.getsource(forward)  # type: ignore[arg-type]
    except (OSError, TypeError, AttributeError):
        return ""  # made at run time: nobody's copy


def _is_silu(function: Any) -> bool:
    return isinstance(function, torch.nn.SiLU | type(ACT2FN["silu"]))
