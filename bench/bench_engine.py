"""Greedy generation by a randomly initialised 10 M decoder against transformers' generate. The gate: equal tokens."""

from __future__ import annotations

import pytest
import torch

from fastsft.engine.llm import LLM
from fastsft.engine.request import SamplingParams
from fastsft.models.tokenizer import Tokenizer
from fastsft.models.weights import init_model, save_model

PROMPT, NEW = 64, 32
CONFIG = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 8192, "hidden_size": 256,
    "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 32, "tie_word_embeddings": True, "max_position_embeddings": 2048,
}  # fmt: skip


@pytest.fixture(scope="module")
def contestants(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("model")
    save_model(init_model(CONFIG, seed=0, dtype=torch.float32), folder)
    Tokenizer.train(["def f(x): return x"], 300).save(folder)
    rival = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    llm = LLM(folder)
    params = SamplingParams(max_tokens=NEW, ignore_eos=True)

    def ours(ids: torch.Tensor) -> list[list[int]]:
        prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
        return [list(r.outputs[0].token_ids) for r in llm.generate(prompts, params)]

    def theirs(ids: torch.Tensor) -> list[list[int]]:
        mask = torch.ones_like(ids)
        out = rival.generate(ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
                             eos_token_id=None, pad_token_id=0)  # fmt: skip
        return out[:, PROMPT:].tolist()

    return {"fastsft": ours, "transformers": theirs}


@pytest.mark.parametrize("contestant", ["fastsft", "transformers"])
@pytest.mark.parametrize("batch", [1, 8])
def test_generate(benchmark, contestants, batch, contestant):
    ids = torch.randint(8192, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
    assert contestants["fastsft"](ids) == contestants["transformers"](ids)
    benchmark.group = f"generate {NEW} tokens after {PROMPT}, batch {batch}, float32"
    benchmark.pedantic(contestants[contestant], (ids,), rounds=5, warmup_rounds=1)
    benchmark.extra_info["tokens_per_second"] = batch * NEW / benchmark.stats["median"]
