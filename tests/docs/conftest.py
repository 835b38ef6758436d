"""What the pages' blocks take for granted: a folder with a tiny model, one of its adapters and some rows."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model under runs/run/model of a folder, and one of its adapters under runs/run/adapter."""
    from fastsft.models.adapter import save_adapter
    from fastsft.models.lora import LoraConfig, add_lora
    from fastsft.models.tokenizer import Tokenizer
    from fastsft.models.weights import init_model, save_model

    folder = tmp_path_factory.mktemp("docs")
    target = folder / "runs" / "run" / "model"
    target.mkdir(parents=True)
    tokenizer = Tokenizer.train(["def add(a, b): return"], 280, ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"))
    fields = {
        "model_type": "qwen2", "vocab_size": 280, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }  # fmt: skip
    model = init_model(fields, seed=0)
    save_model(model, target)
    tokenizer.save(target)
    add_lora(model, LoraConfig(rank=2), seed=0)
    save_adapter(model, folder / "runs" / "run" / "adapter")
    return folder
