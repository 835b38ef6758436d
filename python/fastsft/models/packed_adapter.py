"""Adapters (LoRA) beside a packed decoder: their thin matrices in the kernels' layout, one addition per product."""

from __future__ import annotations

import os

from fastsft.models.decoder import Decoder
from fastsft.models.packed import PackedDecoder
from fastsft.models.stacked_adapter import stack_adapter
from fastsft.ops.decoder import DecoderAdapter
from fastsft.ops.matvec import pack_weight


def pack_adapter(packed: PackedDecoder, adapter: str | os.PathLike[str] | Decoder) -> DecoderAdapter:
    """An adapter for steps of ``packed``, in the type of its activations; the scale goes into B, rounded with it.

    Args:
        packed: the base model, in any format.
        adapter: PEFT's folder, or a decoder that has the adapter on it (its own weights are not read).

    Raises:
        ValueError: a folder that cannot be read or is not plain LoRA on linear layers of the blocks (see
            :func:`fastsft.models.adapter.load_adapter`), a decoder without adapters or of other sizes.
    """
    format = str(packed.dtype).removeprefix("torch.")
    return DecoderAdapter(packed.weights, stack_adapter(packed.config, adapter, lambda w: pack_weight(w, format)))
