"""Models with adapters that do something."""

from __future__ import annotations

from typing import Any

import torch
from parity_table import TINY

from fastsft.models.decoder import Decoder
from fastsft.models.lora import LoraConfig, add_lora, lora_layers
from fastsft.models.weights import init_model

LLAMA = TINY | {"model_type": "llama", "tie_word_embeddings": False}
QWEN2 = TINY | {"model_type": "qwen2", "tie_word_embeddings": True}


def randomise(model: Decoder, seed: int = 7) -> None:
    """B away from 0, so that the adapters count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B.copy_(torch.empty(layer.lora_B.shape).normal_(0, 0.1, generator=generator))


def adapted(config: LoraConfig, keys: dict[str, Any] = LLAMA, dtype: torch.dtype = torch.float32) -> Decoder:
    model = init_model(keys, seed=0, dtype=dtype)
    add_lora(model, config, seed=3)
    randomise(model)
    return model
