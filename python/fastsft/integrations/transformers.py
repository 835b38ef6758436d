"""Hugging Face transformers: ``attn_implementation="fastsft"``, and :func:`enable` for everything else.

Importing this module registers the attention and its mask, for ``from_pretrained(..., attn_implementation="fastsft")``
and ``model.set_attn_implementation("fastsft")``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface

from fastsft.integrations import _layers, _loss
from fastsft.integrations._attention import attention
from fastsft.integrations._layout import layout_mask
from fastsft.integrations._patches import is_patched, replace_forward, restore_forwards

NAME = "fastsft"
_STATE = "_fastsft_enabled"  # on an enabled model: the attention it had, and the patched modules

AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, layout_mask)


def enable(model: Any, *, attention: bool = True, loss: bool = True, layers: bool = True) -> Any:
    """Let fastsft compute the hot paths of this model, and of no other.

    Wrap it afterwards in what wraps models (PEFT, DDP, FSDP, torch.compile). A model that PEFT has wrapped already is
    fine too.

    Args:
        model: a causal language model of transformers.
        attention: ``model.set_attn_implementation("fastsft")``.
        loss: in training, a forward pass with labels gives the loss and no logits (``outputs.logits`` is None), so that
            the [tokens, vocabulary] logits never exist. Without labels, or under ``model.eval()``, nothing changes.
        layers: RMSNorm and SwiGLU, where they are what Llama's are.

    Returns:
        The model, for chaining; :func:`disable` gives it back its own code.

    Raises:
        ValueError: for a model that one of these does not know, that is enabled already, or whose forward somebody has
            replaced. The model is then as it was.
    """
    inner = _inner(model)
    if hasattr(inner, _STATE):
        raise ValueError("enable: model: expected one that is not enabled yet; call disable(model) first")
    if any(is_patched(module) for module in inner.modules()):
        raise ValueError("enable: model: expected no module of another enabled model in it; call disable() on that")
    if loss:
        _loss.check(inner)
        _loss.check_unwrapped(inner)
    patches = list(_layers.forwards(inner)) if layers else []
    if loss:
        patches += [(inner, _loss.causal_lm_forward), *((head, _loss.head_forward) for head in _loss.heads(inner))]
    before = inner.config._attn_implementation
    with contextlib.ExitStack() as undo:  # of a failure half way
        if attention:
            undo.callback(inner.set_attn_implementation, before)
            inner.set_attn_implementation(NAME)
        for module, forward in patches:
            replace_forward(module, forward)
            undo.callback(restore_forwards, [module])
        undo.pop_all()
    setattr(inner, _STATE, (before, [module for module, _ in patches]))
    return model


def disable(model: Any) -> Any:
    """Undo :func:`enable`.

    Raises:
        ValueError: the model is not enabled.
        RuntimeError: something has wrapped one of its forwards since; nothing is undone then.
    """
    inner = _inner(model)
    if not hasattr(inner, _STATE):
        raise ValueError("disable: model: expected one that enable() was called on")
    before, patches = getattr(inner, _STATE)
    # Those that enable() saw, which may have been replaced since, and the copies of them that PEFT has made.
    restore_forwards(module for module in {*patches, *inner.modules()} if is_patched(module))
    inner.set_attn_implementation(before)
    delattr(inner, _STATE)
    return model


@contextlib.contextmanager
def enabled(model: Any, **options: Any) -> Iterator[Any]:
    """:func:`enable` for the length of a ``with`` block."""
    enable(model, **options)
    try:
        yield model
    finally:
        disable(model)


def _inner(model: Any) -> Any:
    """What PEFT wraps."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
