"""Attention as transformers' models call it, by :func:`fastsft.ops.varlen_attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsft import ops
from fastsft.integrations import _layout

HEAD_DIMS = (32, 64, 80, 96, 128, 256)  # that the op has


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    output_attentions: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What each layer calls.

    Args:
        module: the layer; ``is_causal`` of it holds where the argument is not given.
        query: [B, Hq, S, D]; a view of memory [B, S, Hq, D] is taken without a copy.
        key, value: [B, Hkv, S_kv, D], not repeated; value's D may be smaller.
        attention_mask: what the registered mask function made, or None.
        sliding_window: tokens that a query sees, itself included.
        position_ids: checked against the mask, see :func:`fastsft.integrations._layout.check_positions`.
        cu_seq_lens_q, cu_seq_lens_k: documents of the one packed row; they go before what positions say.

    Returns:
        [B, S, Hq, D of value], contiguous, and None for the probabilities, which never exist.

    Raises:
        ValueError: for what this attention does not compute; the message names the argument.
    """
    _require(dropout == 0.0, "dropout", "0 (attention_dropout of the model's config)", dropout)
    _require(s_aux is None, "s_aux", "no attention sinks", "sinks")
    _require(position_bias is None, "position_bias", "None", "a bias")
    _require(cache is None, "cache", "no paged cache", type(cache).__name__)
    _require(not output_attentions, "output_attentions", 'False; model.set_attn_implementation("eager") has them', True)
    rows, heads, queries, width = query.shape
    keys, value_width = key.shape[2], value.shape[3]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    _require(causal or sliding_window is None, "sliding_window", "None without causality", sliding_window)
    _require(sliding_window is None or sliding_window > 0, "sliding_window", "None or at least 1", sliding_window)

    query, key, value = _of_one_type(module, query, key, value)
    held = next((d for d in HEAD_DIMS if d >= max(width, value_width)), None)
    _require(held is not None, "query", f"a head size of at most {HEAD_DIMS[-1]}", max(width, value_width))
    q, k, v = (_rows_end_to_end(x, held) for x in (query, key, value))

    layout = _layout.layout_in(attention_mask)
    if attention_mask is not None and layout is None:
        expected = "a 2-D mask given to the model, or none" if cu_seq_lens_q is None else "None with cu_seq_lens_q"
        _require(False, "attention_mask", expected, f"a mask {attention_mask.dtype} {list(attention_mask.shape)}")
    if cu_seq_lens_q is not None:
        cu_q, cu_k = _given(layout, rows, cu_seq_lens_q, cu_seq_lens_k)
    else:
        cu_q, cu_k = _layout.dense(rows, queries, keys, query.device) if layout is None else layout[0, 0, :2]
    positions = position_ids if causal and cu_seq_lens_q is None else None
    _check(module, attention_mask, sliding_window, cu_q, cu_k, positions, (rows, queries, keys))
    out = ops.varlen_attention(
        q, k, v, cu_q, cu_k,
        causal=causal,
        scale=width**-0.5 if scaling is None else scaling,
        window=None if sliding_window is None else (sliding_window - 1, 0),
        softcap=softcap or 0.0,
    )  # fmt: skip
    return out[..., :value_width].reshape(rows, queries, heads, value_width), None


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"fastsft attention: {name}: expected {expected}, got {got}")


def _rows_end_to_end(x: Tensor, width: int | None) -> Tensor:
    """[B, H, S, D] -> [B S, H, width]."""
    if width != x.shape[-1]:
        x = torch.nn.functional.pad(x, (0, (width or 0) - x.shape[-1]))
    return x.transpose(1, 2).flatten(0, 1)


def _of_one_type(module: torch.nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Norms kept in float32 (PEFT's, for one) and autocast give float32 to a model of 16 bits: back to its type."""
    types = {x.dtype for x in tensors}
    if torch.float32 in types:
        kind = tensors[0].device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        else:
            linear = next((m for m in module.modules() if isinstance(m, torch.nn.Linear)), None)
            dtype = linear.weight.dtype if linear is not None and linear.weight.is_floating_point() else torch.float32
        return tuple(x.to(dtype) for x in tensors)
    return tensors


def _given(layout: Tensor | None, rows: int, cu_q: Tensor, cu_k: Tensor | None) -> tuple[Tensor, Tensor]:
    _require(rows == 1, "cu_seq_lens_q", "one packed row with it", f"{rows} rows")
    if layout is not None:
        _layout.refuse(
            (layout[0, 0, 0] != layout[0, 0, 1]).any(),
            "fastsft attention: attention_mask: expected neither padding nor a cache with cu_seq_lens_q",
        )
    cu_q = cu_q.to(torch.int32)
    return cu_q, cu_q if cu_k is None else cu_k.to(torch.int32)


def _check(
    module: torch.nn.Module,
    mask: Tensor | None,
    sliding_window: int | None,
    cu_q: Tensor,
    cu_k: Tensor,
    position_ids: Tensor | None,
    shape: tuple[int, int, int],
) -> None:
    """Hold what only a layer knows against the mask: its window, once for each that there is; its keys and positions,
    once."""
    rows, queries, keys = shape
    layout = _layout.layout_in(mask)
    remembers = layout is not None and not torch.compiler.is_compiling()
    known: set[int | None] = getattr(mask, "fastsft_windows", set()) if remembers else set()
    first = not known if remembers else getattr(module, "layer_idx", None) in (0, None)
    if layout is not None and first:
        _layout.check_keys(cu_k, rows, keys)
    if layout is not None and sliding_window not in known:
        _layout.check_window(layout, sliding_window, cu_q, cu_k)
    if first and position_ids is not None and position_ids.dim() == 2:
        _layout.check_positions(cu_q, cu_k, position_ids, rows, queries)
    if remembers:
        mask.fastsft_windows = known | {sliding_window}  # type: ignore[union-attr]
