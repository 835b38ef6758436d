"""The loss within a causal language model's forward, without its [tokens, vocabulary] logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastsft import ops
from fastsft.integrations._patches import has_own_forward, is_patched, original

# Whose forward is: backbone, slice, lm_head, then the scale or the cap that scaling() knows. The tests hold each of
# them against its own forward.
FAMILIES = (
    "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "granite", "llama", "ministral", "mistral", "olmo2", "olmo3",
    "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "starcoder2",
)  # fmt: skip


def causal_lm_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """In training and with labels: the loss alone (``logits`` is None). In all else the model's own forward.

    The result is that of transformers' ``ForCausalLMLoss``, with ``num_items_in_batch``, ``shift_labels``,
    ``ignore_index`` and ``logits_to_keep`` as there, except that a batch in which no token has a label has loss 0.
    """
    given = kwargs
    if args:
        given = dict(zip(list(inspect.signature(type(self).forward).parameters)[1:], args, strict=False)) | kwargs
    wants_loss = given.get("labels") is not None or given.get("shift_labels") is not None
    if not self.training or not wants_loss or self.loss_function is not ForCausalLMLoss:
        return original(self)(*args, **kwargs)

    given = dict(given)
    labels, shifted = given.pop("labels", None), given.pop("shift_labels", None)
    items = given.pop("num_items_in_batch", None)
    ignore_index, keep = given.pop("ignore_index", -100), given.pop("logits_to_keep", 0)
    return_dict = given.pop("return_dict", None)
    outputs = self.base_model(**given)
    hidden = _kept(outputs.last_hidden_state, keep)
    targets = next_labels(labels, ignore_index) if shifted is None else shifted
    loss = head_of(self)(
        hidden.flatten(0, -2),
        fused=ops.linear_cross_entropy,
        targets=targets.flatten().to(hidden.device),
        ignore_index=ignore_index,
        normalizer=None if items is None else torch.as_tensor(items, dtype=torch.float32).sum(),
        **scaling(self.config),
    )
    out = CausalLMOutputWithPast(
        loss=loss, past_key_values=outputs.get("past_key_values"), hidden_states=outputs.get("hidden_states"),
        attentions=outputs.get("attentions"),
    )  # fmt: skip
    return out if (self.config.return_dict if return_dict is None else return_dict) else out.to_tuple()


def head_forward(
    self: torch.nn.Linear, hidden: Tensor, *, fused: Callable[..., Any] | None = None, **options: Any
) -> Any:
    """``fused(hidden, weight, bias=bias, ...)`` in the head's place, as a call of the head itself: whatever acts on a
    module's call (FSDP gathers its weight) acts on it too."""
    if fused is None:
        return original(self)(hidden)
    return fused(hidden, self.weight, bias=self.bias, **options)


def check(model: Any) -> None:
    """
    Raises:
        ValueError: for a model whose loss is not computed here.
    """
    kind = model.config.model_type
    if kind not in FAMILIES or type(model).__name__[-len("ForCausalLM") :] != "ForCausalLM":
        known = ", ".join(FAMILIES)
        raise ValueError(
            f"enable: model: expected a causal language model of {known}, got {type(model).__name__} ({kind}); "
            "with loss=False the model computes its loss itself"
        )
    if not _is_theirs(type(model).forward):
        raise ValueError(
            f"enable: model: expected the forward that transformers gives a {kind} model, got that of "
            f"{type(model).__module__}.{type(model).__qualname__}, which this loss would go past; give loss=False"
        )
    for head in heads(model):
        if not isinstance(head, torch.nn.Linear) or type(head).forward is not torch.nn.Linear.forward:
            got = f"{type(head).__module__}.{type(head).__name__}"
            raise ValueError(f"enable: model: expected torch.nn.Linear as its lm_head, got {got}; give loss=False")
        check_unwrapped(head)


def check_unwrapped(module: torch.nn.Module) -> None:
    """
    Raises:
        ValueError: the forward of this instance was replaced, and the loss would go past it.
    """
    if hasattr(module, "_hf_hook"):
        raise ValueError(
            f"enable: model: expected no hooks of accelerate (a device_map), got them on {type(module).__name__}: the "
            "loss reads the head's weight where it lies. Give loss=False, or, if all of the model is on one device, "
            "take them off: accelerate.hooks.remove_hook_from_module(model, recurse=True)"
        )
    if has_own_forward(module):
        raise ValueError(
            f"enable: model: the forward of {type(module).__name__} has been wrapped already (accelerate's prepare() "
            "does so); call enable() before that, or give loss=False"
        )


def heads(model: Any) -> list[torch.nn.Module]:
    """The head; where PEFT trains it whole (modules_to_save), the first one and its copies, one per adapter."""
    head = model.get_output_embeddings()
    return [head.original_module, *head.modules_to_save.values()] if hasattr(head, "modules_to_save") else [head]


def head_of(model: Any) -> Any:
    """The head, patched or PEFT's modules_to_save that hands calls on to a patched one; not an adapter around it."""
    head = called = model.get_output_embeddings()
    if hasattr(head, "modules_to_save"):
        active = head.active_adapters
        copied = not head.disable_adapters and active and active[0] in head.modules_to_save
        called = head.modules_to_save[active[0]] if copied else head.original_module
    if not is_patched(called):
        got = f"{type(head).__module__}.{type(head).__name__}"
        raise ValueError(f"fastsft loss: lm_head: expected the one that enable() saw, got {got}; enable(loss=False)")
    return head


def scaling(config: Any) -> dict[str, float]:
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    softcap = getattr(config, "final_logit_softcapping", None) or 0.0
    if softcap and scale != 1.0:
        raise ValueError("fastsft loss: config: expected logit_scale or final_logit_softcapping, got both")
    return {"softcap": float(softcap), "temperature": 1.0 / scale}


def next_labels(labels: Tensor, ignore_index: int) -> Tensor:
    """Each position's label is the next position's."""
    return torch.nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)


def _is_theirs(forward: Any) -> bool:
    """Whether a forward and each decorator around it is transformers' own code."""
    while getattr(forward, "__globals__", {}).get("__name__", "").startswith("transformers."):
        if not hasattr(forward, "__wrapped__"):
            return True
        forward = forward.__wrapped__
    return False


def _kept(hidden: Tensor, keep: int | Tensor) -> Tensor:
    """The positions that ``logits_to_keep`` names, as transformers' ``slice_logits_to_keep`` reads it."""
    if isinstance(keep, int):
        return hidden[:, -keep:] if keep else hidden
    if keep.dim() == 1:
        return hidden[:, keep]
    if keep.dtype == torch.bool:
        return hidden[keep][None]
    return torch.take_along_dim(hidden, keep[..., None], dim=1)
