"""The tensors that hold keys and values, block by block."""

from __future__ import annotations

import torch

from fastsft.models.config import ModelConfig


class KVCache:
    """Keys and values of all layers: per layer two tensors [num_blocks, block_size, Hkv, D]."""

    def __init__(self, config: ModelConfig, *, num_blocks: int, block_size: int, dtype: torch.dtype) -> None:
        shape = (num_blocks, block_size, config.num_key_value_heads, config.head_dim)
        self.block_size = block_size
        self.keys = [torch.zeros(shape, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype) for _ in range(config.num_hidden_layers)]

    @staticmethod
    def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return per_token * block_size * dtype.itemsize

    def write(self, layer: int, slots: torch.Tensor, k_TGK: torch.Tensor, v_TGK: torch.Tensor) -> None:
        """Store the keys and values of T tokens; slot = block * block_size + place in the block."""
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, k_TGK)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, v_TGK)

    def copy_block(self, source: int, target: int) -> None:
        for layer in range(len(self.keys)):
            self.keys[layer][target] = self.keys[layer][source]
            self.values[layer][target] = self.values[layer][source]
