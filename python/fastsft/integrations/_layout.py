"""The mask of a batch as offsets: which packed queries see which packed keys, without a [queries, keys] tensor.

transformers asks the registered mask function for a mask once per forward pass and hands what it gets to every layer.
Ours is a layout: int32 [1, 1, 4, N + 1], of which the first two are ``cu_seqlens`` of the queries and of the keys of N
segments, where the batch's rows are laid end to end. Four dimensions, as transformers passes such masks on untouched.
Within a segment attention is causal and aligned at its end.

The window of a layer reaches it as an argument of its own, which need not be what the mask says, and transformers
makes masks that no layer uses. So the layout carries the mask's window (third) and whether segments and that window are
not all there is to it (fourth); :func:`check_window` refuses where a layer uses it.

A row with padding is five segments, so that nothing has to be gathered and the sizes do not depend on values:
queries before its content (which see no key), keys before it (which nobody sees), the content, keys after, queries
after.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

NO_WINDOW = torch.iinfo(torch.int32).max


class Layout(Tensor):
    """What the layers are handed: it can be moved and copied, and refuses whoever computes with it, as it is no mask of
    [queries, keys]. Graphs are traced with a plain tensor."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not torch.compiler.is_compiling():
            of = getattr(function, "__self__", None)  # the property that a getter is of
            if of is Tensor.shape:
                return _Shape(range(4))
            if of not in _FACTS and function not in _HANDED_ON:
                _refuse_arithmetic(function.__name__)
        return super().__torch_function__(function, types, args, kwargs)  # type: ignore[no-untyped-call]


_FACTS = (
    Tensor.device, Tensor.dtype, Tensor.grad, Tensor.grad_fn, Tensor.is_cuda, Tensor.layout, Tensor.ndim,
    Tensor.requires_grad,
)  # fmt: skip
_HANDED_ON = (
    Tensor.as_subclass, Tensor.clone, Tensor.contiguous, Tensor.cpu, Tensor.cuda, Tensor.detach, Tensor.dim,
    Tensor.get_device, Tensor.is_complex, Tensor.is_floating_point, Tensor.to, Tensor.__repr__, torch.is_complex,
    torch.is_floating_point,
)  # fmt: skip


class _Shape(tuple[int, ...]):
    """transformers asks how many dimensions there are; how many queries and keys, it does not say."""

    def __getitem__(self, _: Any) -> NoReturn:
        _refuse_arithmetic("shape")

    def __iter__(self) -> NoReturn:
        _refuse_arithmetic("shape")


def _refuse_arithmetic(name: str) -> NoReturn:
    raise ValueError(
        f"fastsft attention: attention_mask: expected a model that only hands it to its attention, got one whose own "
        f'code computes with it ({name}); model.set_attn_implementation("eager") has a mask for that'
    )


def layout_in(mask: Tensor | None) -> Tensor | None:
    """The layout that a layer was handed, as a plain tensor; None for any other mask."""
    if mask is None or mask.dtype != torch.int32 or mask.dim() != 4:
        return None
    with torch._C.DisableTorchFunctionSubclass():
        return mask[:]  # compiled, as_subclass() is not known


def dense(rows: int, queries: int, keys: int, device: Any) -> Tensor:
    """``cu_seqlens`` of the queries and of the keys, [2, rows + 1]: every row a segment."""
    bounds = torch.arange(rows + 1, dtype=torch.int32, device=device)
    return torch.stack([bounds * queries, bounds * keys])


def layout_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: Any = "cpu",
    **_: Any,
) -> Tensor:
    """What transformers calls for ``attn_implementation="fastsft"``: see ``transformers.masking_utils``.

    Args:
        local_size: of a window or of chunks; which of the two, the mask function tells.

    Raises:
        ValueError: for a mask that sees later tokens, is not contiguous, or has functions of the caller in it.
    """
    if use_vmap:
        raise ValueError("fastsft attention: and_mask_function, or_mask_function: expected neither; use sdpa for them")
    window = NO_WINDOW if local_size is None else local_size
    apart = _documents_begin(mask_function, batch_size, q_length, q_offset, device)
    if attention_mask is None and isinstance(q_offset, int) and q_offset == 0 and kv_length == q_length:
        bounds = _packed(apart, batch_size, q_length, device)
        index = torch.arange(1, q_length, device=device)
        begin = torch.nn.functional.pad(torch.where(apart, index, 0), (1, 0)).amax(1)
        end = torch.full_like(begin, q_length)
        unlike = torch.zeros((), dtype=torch.bool, device=device)
    else:
        begin, end = _content(batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask, device)
        bounds, unlike = _padded(apart, begin, end, q_length, kv_length, q_offset - kv_offset)
    if mask_function is not None:
        unlike = unlike | _last_query_sees_otherwise(mask_function, begin, end, kv_length, kv_offset, window)
    facts = torch.stack([torch.full_like(unlike, window, dtype=torch.int32), unlike.to(torch.int32)])
    layout = torch.cat([bounds, facts[:, None].expand(2, bounds.shape[1])])[None, None]
    return layout if torch.compiler.is_compiling() else layout.as_subclass(Layout)


def _last_query_sees_otherwise(
    mask_function: Callable[..., Tensor], begin: Tensor, end: Tensor, keys: int, kv_offset: int | Tensor, window: int
) -> Tensor:
    """Whether the last query of each row sees other keys than those in [begin, end) and in the window.

    One row of the mask, for what cannot be seen between neighbours: a single query after cached keys, say.
    """
    row = torch.arange(len(begin), device=begin.device)[:, None]
    key = torch.arange(keys, device=begin.device)[None]
    last = end[:, None] - 1
    held = (key >= begin[:, None]) & (key <= last)
    # a row of padding alone has no last query: any will do, as nothing of it is held
    seen = mask_function(row, row.new_zeros(()), last.clamp(min=0) + kv_offset, key + kv_offset)
    return (held & (seen != (last - key < window))).any()


def _documents_begin(
    mask_function: Callable[..., Tensor] | None, rows: int, length: int, offset: int | Tensor, device: Any
) -> Tensor:
    """bool [rows, length - 1]: whether the token after does not see the one before it.

    In causal attention within documents (or chunks) that is where the next one begins. The mask function is all there
    is to read documents from: transformers derives them from ``position_ids`` and hides them in it.
    """
    if mask_function is None or length < 2:
        return torch.zeros(rows, max(length - 1, 0), dtype=torch.bool, device=device)
    row = torch.arange(rows, device=device)[:, None]
    index = torch.arange(length, device=device)[None] + offset
    head = index.new_zeros(())
    before, after = index[:, :-1], index[:, 1:]
    refuse(
        mask_function(row, head, before, after).any(),
        "fastsft attention: attention_mask: expected a causal mask, got one by which tokens see later ones; use sdpa",
    )
    return ~mask_function(row, head, after, before).expand(rows, length - 1)


def _packed(apart: Tensor, rows: int, length: int, device: Any) -> Tensor:
    total = rows * length
    begins = torch.ones(rows, length, dtype=torch.bool, device=device)
    begins[:, 1:] = apart
    if torch.compiler.is_compiling():  # as many segments as there may be, the last ones empty: a size without values
        bounds = torch.full((total + 1,), total, dtype=torch.int64, device=device)
        token = torch.arange(total, device=device)
        bounds = bounds.scatter_reduce(0, begins.flatten().cumsum(0) - 1, token, "amin")
    else:
        bounds = torch.nn.functional.pad(begins.flatten().nonzero().flatten(), (0, 1), value=total)
    return bounds.to(torch.int32).expand(2, -1)


def _content(
    rows: int,
    queries: int,
    keys: int,
    q_offset: int | Tensor,
    kv_offset: int | Tensor,
    mask: Tensor | None,
    device: Any,
) -> tuple[Tensor, Tensor]:
    """Where the keys of each row begin and end, [rows] each, without padding and what a static cache has room for."""
    first = q_offset - kv_offset  # key position of the first query
    position = torch.arange(keys, device=device)
    kept = (position < first + queries).expand(rows, keys)
    if mask is not None:
        missing = keys + kv_offset - mask.shape[1] if isinstance(kv_offset, int) else keys
        mask = torch.nn.functional.pad(mask.to(torch.bool), (0, max(missing, 0)))
        kept = kept & mask.index_select(1, position + kv_offset)
    begin = torch.where(kept, position, keys).amin(1)
    end = torch.where(kept, position + 1, 0).amax(1)
    begin = torch.minimum(begin, end)
    refuse(
        (kept.sum(1) != end - begin).any(),
        "fastsft attention: attention_mask: expected one run of ones in each row, got zeros between ones (after a "
        "learnt prefix, pad on the right)",
    )
    return begin, end


def _padded(
    apart: Tensor, begin: Tensor, end: Tensor, queries: int, keys: int, first: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Rows with padding or with more keys than queries, and whether the mask cuts one of them."""
    rows, device = len(begin), begin.device
    from_query, to_query = ((x - first).clamp(0, queries) for x in (begin, end))
    index = torch.arange(1, queries, device=device)
    cut = (apart & (index > from_query[:, None]) & (index < to_query[:, None])).any()
    if not torch.compiler.is_compiling() and bool(((end - begin == keys) & (to_query - from_query == queries)).all()):
        return dense(rows, queries, keys, device), cut
    q_bounds = torch.stack([from_query, from_query, to_query, to_query, torch.full_like(end, queries)], 1)
    k_bounds = torch.stack([torch.zeros_like(begin), begin, end, *[torch.full_like(end, keys)] * 2], 1)
    row = torch.arange(rows, device=device)[:, None]
    both = torch.stack([(q_bounds + row * queries).flatten(), (k_bounds + row * keys).flatten()])
    return torch.nn.functional.pad(both, (1, 0)).to(torch.int32), cut


def check_keys(cu_k: Tensor, rows: int, keys: int) -> None:
    """Refuse a mask that was made for other keys than a layer has."""
    refuse(
        cu_k[-1] != rows * keys,
        f"fastsft attention: attention_mask: expected one of the {keys} keys of this layer, got one of another number: "
        "keys before the row's own (PEFT's prefix tuning, a cache) have been dropped, as gradient checkpointing does; "
        "give gradient_checkpointing=False",
    )


def check_window(layout: Tensor, sliding_window: int | None, cu_q: Tensor, cu_k: Tensor) -> None:
    """Refuse a mask that is not ``sliding_window`` of the segments' keys, where a layer uses it.

    Args:
        layout: what :func:`layout_mask` made.
        sliding_window: the layer's argument.
        cu_q, cu_k: the segments that the layer will use.
    """
    window, unlike = layout[0, 0, 2, 0], layout[0, 0, 3, 0]
    refuse(
        unlike != 0,
        "fastsft attention: attention_mask: expected full or sliding-window attention, or chunks with neither padding "
        "nor a cache, got another mask from the model; use sdpa",
    )
    asked = NO_WINDOW if sliding_window is None else sliding_window
    longest = (cu_k.diff() * (cu_q.diff() > 0)).amax()
    refuse(
        (window != asked) & (window.clamp(max=asked) < longest),
        f"fastsft attention: sliding_window: expected what the model's mask says, got {sliding_window} and a mask with "
        "another window, or with chunks; use sdpa",
    )


def check_positions(cu_q: Tensor, cu_k: Tensor, position_ids: Tensor, rows: int, queries: int) -> None:
    """Refuse positions that restart or jump where the segments have no new document: attention would cross documents.

    transformers derives documents from positions only where neither a 2-D mask nor a cache is given.
    """
    cu_q, cu_k = cu_q.long(), cu_k.long()
    position = position_ids.expand(rows, queries).flatten()
    token = torch.arange(rows * queries, device=position.device)
    segment = torch.searchsorted(cu_q, token, right=True) - 1
    sees_keys = cu_k.diff()[segment] > 0
    begins = cu_q[segment] == token
    step = position[1:] - position[:-1]
    inside = sees_keys[1:] & ~begins[1:]
    refuse(
        (inside & (step != 1)).any(),
        "fastsft attention: position_ids: they restart or jump within what the mask says is one document. Give neither "
        "attention_mask nor a cache (use_cache=False) with packed rows, or, for models that make their mask without "
        "position_ids (OPT, BioGPT, AFMoE), give cu_seq_lens_q and cu_seq_lens_k",
    )
    new_row = token[1:] % queries == 0
    refuse(
        (sees_keys[1:] & sees_keys[:-1] & begins[1:] & ~new_row & (position[1:] != 0)).any(),
        "fastsft attention: position_ids: they jump to a number other than 0. transformers' masks begin a new document "
        "there and its flash attention does not: give cu_seq_lens_q and cu_seq_lens_k",
    )


def refuse(condition: Tensor, message: str) -> None:
    """Raise if it is true. In a compiled graph, whose values are not known yet, the graph itself stops."""
    if torch.compiler.is_compiling():
        torch._assert_async(~condition, message)
    elif bool(condition):
        raise ValueError(message)
