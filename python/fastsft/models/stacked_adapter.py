"""An adapter's (LoRA) thin matrices as an engine stacks them, one addition per product of a step."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from fastsft.models.adapter import read_adapter
from fastsft.models.config import ModelConfig
from fastsft.models.decoder import Decoder
from fastsft.models.lora import lora_layers
from fastsft.models.skeleton import skeleton
from fastsft.models.stacked import check_sizes
from fastsft.ops.decoder import AdapterLayer, LowRank, Weight


def stack_adapter(
    config: ModelConfig, adapter: str | os.PathLike[str] | Decoder, pack: Callable[[Tensor], Weight]
) -> list[AdapterLayer[Weight]]:
    """A layer's additions each; the scale is in B.

    Args:
        config: of the base model.
        adapter: PEFT's folder, or a decoder that has the adapter on it (its own weights are not read).
        pack: float32 [N, K] on the CPU, to what a step reads.

    Raises:
        ValueError: a folder that cannot be read or is not plain LoRA on linear layers of the blocks (see
            :func:`fastsft.models.adapter.load_adapter`), a decoder without adapters or of other sizes.
    """
    found = _of_decoder(config, adapter) if isinstance(adapter, Decoder) else _of_folder(config, adapter)
    heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim

    def low(i: int, parts: dict[str, int]) -> LowRank[Weight] | None:
        """``parts``: linear layer -> output channels, in the order in which they are stacked."""
        pairs = {name: found[path] for name in parts if (path := f"layers.{i}.{name}") in found}
        if not pairs:
            return None
        a = torch.cat([pair[0] for pair in pairs.values()])
        b, row, column = torch.zeros(sum(parts.values()), len(a), dtype=torch.float32), 0, 0
        for name, width in parts.items():
            if name in pairs:
                own = pairs[name][1]
                b[row : row + width, column : column + own.shape[1]] = own
                column += own.shape[1]
            row += width
        return LowRank(pack(a), pack(b))

    return [
        AdapterLayer(
            qkv=low(i, {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads, "self_attn.v_proj": kv_heads}),
            o=low(i, {"self_attn.o_proj": config.hidden_size}),
            gate_up=low(i, {"mlp.gate_proj": config.intermediate_size, "mlp.up_proj": config.intermediate_size}),
            down=low(i, {"mlp.down_proj": config.hidden_size}),
        )
        for i in range(config.num_hidden_layers)
    ]


def _of_folder(config: ModelConfig, folder: str | os.PathLike[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> A and scale B, in float32."""
    with skeleton():
        empty = Decoder(config)
    lora, stored = read_adapter(empty, folder)
    return {name: (a.float(), b.float() * lora.scale) for name, (a, b) in stored.items()}


def _of_decoder(config: ModelConfig, model: Decoder) -> dict[str, tuple[Tensor, Tensor]]:
    check_sizes("adapter", config, model.config)
    found = {
        name: (layer.lora_A.detach().float().cpu(), layer.lora_B.detach().float().cpu() * layer.config.scale)
        for name, layer in lora_layers(model)
    }
    if not found:
        raise ValueError("adapter: model: expected one with adapters, found none")
    return found
