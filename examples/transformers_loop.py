"""Fine-tune every weight of a Hugging Face model in a loop of your own, on packed documents.

    python examples/transformers_loop.py path/or/name/of/a/model

transformers runs the model; after ``enable(model)`` its attention, norms, gates and loss are fastsft's: no padding, no
mask tensor and no [tokens, vocabulary] logits. Without a name, a tiny model with random weights stands in, so that the
loop can be tried without a download.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import transformers

from fastsft.integrations.transformers import enable


def load(name: str | None) -> Any:
    if name:
        return transformers.AutoModelForCausalLM.from_pretrained(name, dtype="bfloat16")
    config = transformers.Qwen2Config(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


def pack(documents: list[list[int]]) -> dict[str, torch.Tensor]:
    """One row of all documents: positions begin anew with each, and no document's first token has a label."""
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch: dict[str, torch.Tensor] = collate([{"input_ids": document} for document in documents])
    return batch


def main(name: str | None = None, steps: int = 20) -> tuple[float, float]:
    """Train and return the first and the last loss."""
    torch.manual_seed(0)
    model = enable(load(name).train())
    texts = [f"def add_{n}(x):\n    return x + {n}\n" for n in range(16)]
    if name:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        batch = pack([tokenizer.encode(text) for text in texts])
    else:
        batch = pack([list(text.encode()) for text in texts])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5 if name else 3e-3)
    losses: list[float] = []
    for step in range(steps):
        loss = model(**batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step:3}  loss {losses[-1]:.4f}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main(*sys.argv[1:2])
