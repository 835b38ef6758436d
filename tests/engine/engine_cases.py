"""Tiny random models for the engine's tests, with transformers' view of the same folder."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastsft.engine.llm import LLM
from fastsft.models.adapter import save_adapter
from fastsft.models.decoder import Decoder
from fastsft.models.heads import DraftHeads, save_heads
from fastsft.models.lora import LoraConfig, add_lora, lora_layers
from fastsft.models.tokenizer import Tokenizer
from fastsft.models.weights import init_model, load_model, save_model

VOCAB = 280
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": 9},
}
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


@cache
def tokenizer() -> Tokenizer:
    """Bytes, a few merges and the markers. Its end tokens have ids 0 and 2."""
    return Tokenizer.train(["the cat sat on the mat"], VOCAB, ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"])


def write_model(folder: Path, family: str) -> Path:
    save_model(init_model(SHAPE | FAMILIES[family], seed=5), folder)
    tokenizer().save(folder)
    return folder


def write_heads(folder: Path, std: float, seed: int = 0, count: int = 3) -> DraftHeads:
    """Not trained: some guesses hold by chance."""
    heads = DraftHeads(count, SHAPE["hidden_size"])
    generator = torch.Generator().manual_seed(seed)
    for parameter in heads.parameters():
        parameter.data.normal_(0, std, generator=generator)
    save_heads(heads, folder, vocab_size=VOCAB)
    return heads


def adapted(folder: Path, seed: int) -> Decoder:
    """The folder's model with an adapter of its own rank that changes all of its texts."""
    model = load_model(folder)
    add_lora(model, LoraConfig(rank=4 + seed, alpha=8.0), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B.normal_(0, 0.1, generator=generator)
    return model


def write_adapters(model_folder: Path, parent: Path, *names: str) -> dict[str, Path]:
    for seed, name in enumerate(names):
        save_adapter(adapted(model_folder, seed), parent / name)
    return {name: parent / name for name in names}


def engine(folder: Path, **options: Any) -> LLM:
    return LLM(folder, **({"num_blocks": 64, "block_size": 16} | options))


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(8, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def as_prompts(prompts: list[list[int]]) -> list[dict[str, Any]]:
    return [{"prompt_token_ids": p} for p in prompts]


class Reference:
    """transformers, one prompt at a time."""

    def __init__(self, folder: Path) -> None:
        import transformers

        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        ).eval()

    @torch.no_grad()
    def greedy(self, prompt: list[int], count: int, ends: tuple[int, ...] = ()) -> list[int]:
        ids = torch.tensor([prompt])
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
            eos_token_id=list(ends) or None, pad_token_id=0,
        )  # fmt: skip
        found: list[int] = out[0, len(prompt) :].tolist()
        return found

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """[len(ids), V]: row t is the distribution after ids[: t + 1]."""
        return torch.log_softmax(self.model(torch.tensor([ids])).logits[0].double(), -1)


def assert_nothing_held(llm: LLM) -> None:
    """After a call the cache is as empty as before it."""
    stats = llm.core.stats()
    assert stats.free_blocks == stats.blocks
    assert not any(llm.core._allocator._references)
    assert not llm.core.busy
